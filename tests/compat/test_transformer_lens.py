"""TransformerLens' patching by its own names: the same metrics as the real package gives, where it is installed."""

import inspect
import sys

import pytest
import torch
from close import assert_close

from vaecirc_fast.compat import transformer_lens as ours
from vaecirc_fast.errors import InputError, MissingExtra

LAYERS, HEADS, POSITIONS, BATCH = 2, 2, 5, 3
EVERY = ("get_act_patch_attn_head_all_pos_every", "get_act_patch_attn_head_by_pos_every", "get_act_patch_block_every")
NAMES = sorted(n for n in vars(ours) if n.startswith("get_act_patch_"))


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("transformer_lens.patching")


def model_of(dtype, **settings):
    import transformer_lens

    settings = {"act_fn": "gelu", "normalization_type": "LN", **settings}
    config = transformer_lens.HookedTransformerConfig(
        n_layers=LAYERS, d_model=8, n_ctx=8, d_head=4, n_heads=HEADS, d_mlp=16, d_vocab=11, seed=1, **settings
    )
    model = transformer_lens.HookedTransformer(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / p.shape[-1] ** 0.5)
    return model.to(dtype)


def run(module, name, dtype, **settings):
    model = model_of(dtype, **settings)
    clean, corrupted = torch.randint(11, (2, BATCH, POSITIONS), generator=torch.Generator().manual_seed(0))
    _, cache = model.run_with_cache(clean)
    return getattr(module, name)(model, corrupted, cache, metric)


def metric(logits):
    assert logits.shape == (BATCH, POSITIONS, 11)
    return (logits[:, -1, 1] - logits[:, -1, 3]).square().mean()


@pytest.mark.parametrize("name", NAMES)
def test_every_function_gives_the_same(theirs, name):
    truth, reference = (run(theirs, name, dtype) for dtype in (torch.float64, torch.float32))
    found = run(ours, name, torch.float32)
    assert_close(found, reference, truth.double(), terms=200, unit=truth.double().abs().max())
    assert len(truth.unique()) > 3


@pytest.mark.parametrize(
    "settings",
    [
        {"n_key_value_heads": 1},
        {"final_rms": True, "normalization_type": "RMS", "gated_mlp": True},
        {"positional_embedding_type": "rotary", "rotary_dim": 4},
        {"parallel_attn_mlp": True, "normalization_type": None, "attn_only": False},
        {"use_attn_result": True, "use_split_qkv_input": True, "use_hook_mlp_in": True},
    ],
)
def test_other_transformers(theirs, settings):
    for name in ("get_act_patch_attn_head_by_pos_every", "get_act_patch_resid_pre"):
        truth, reference = (run(theirs, name, dtype, **settings) for dtype in (torch.float64, torch.float32))
        found = run(ours, name, torch.float32, **settings)
        assert_close(found, reference, truth.double(), terms=200, unit=truth.double().abs().max())


def test_any_setter_and_indices(theirs):
    """Indices in a table, in any order; a setter that changes its copy, or returns something new."""
    import pandas

    model = model_of(torch.float32)
    clean, corrupted = torch.randint(11, (2, BATCH, POSITIONS), generator=torch.Generator().manual_seed(0))
    _, cache = model.run_with_cache(clean)
    table = pandas.DataFrame([(1, 2, 3), (0, 4, 0), (1, 0, 7), (0, 1, 1)], columns=["layer", "pos", "neuron"])

    def new(activation, index, clean):
        layer, pos, neuron = index
        activation = activation.clone()
        activation[:, pos, neuron] = 2 * clean[:, pos, neuron]
        return activation

    def in_place(activation, index, clean):
        activation[:, index[1], index[2]] = 2 * clean[:, index[1], index[2]]
        return activation

    for setter in (new, in_place):
        options = {"patch_setter": setter, "activation_name": "post", "index_df": table, "return_index_df": True}
        found, indices = ours.generic_activation_patch(model, corrupted, cache, metric, **options)
        expected, _ = theirs.generic_activation_patch(model, corrupted, cache, metric, **options)
        torch.testing.assert_close(found, expected)
        assert indices is table and found.shape == (4,)


def test_the_signatures_are_theirs(theirs):
    for name in ("generic_activation_patch", *EVERY, *(n for n in dir(theirs) if n.endswith("patch_setter"))):
        signatures = [inspect.signature(getattr(module, name)).parameters.values() for module in (ours, theirs)]
        assert [[(p.name, p.default) for p in s] for s in signatures][0] == [(p.name, p.default) for p in signatures[1]]
    assert NAMES == sorted(n for n in dir(theirs) if n.startswith("get_act_patch_"))


def test_what_is_before_a_patch_runs_a_few_times(theirs):
    model = model_of(torch.float32)
    clean, corrupted = torch.randint(11, (2, BATCH, POSITIONS))
    _, cache = model.run_with_cache(clean)
    calls = []
    model.embed.register_forward_hook(lambda *_: calls.append(1))
    found = ours.get_act_patch_attn_head_pattern_dest_src_pos(model, corrupted, cache, metric)
    assert found.numel() == LAYERS * HEADS * POSITIONS**2 and len(calls) <= 5


def test_refused(theirs):
    model = model_of(torch.float32)
    tokens = torch.randint(11, (BATCH, POSITIONS))
    _, cache = model.run_with_cache(tokens)
    options = {"patch_setter": ours.layer_pos_patch_setter, "activation_name": "resid_pre"}
    for more, message in (
        ({}, "index_axis_names, index_df: give one of them"),
        ({"index_axis_names": ("layer", "place")}, "index_axis_names: 'place' is unknown; known: layer"),
        ({"activation_name": "nothing", "index_axis_names": ("layer", "pos")}, "has no blocks.0.hook_nothing"),
        ({"clean_cache": {}, "index_axis_names": ("layer", "pos")}, "clean_cache: holds no blocks.0.hook_resid_pre"),
        ({"patching_metric": lambda y: y[:, -1], "index_axis_names": ("layer", "pos")}, r"got \(3, 11\)"),
        ({"patching_metric": lambda y: 1.0, "index_axis_names": ("layer", "pos")}, "got float"),
        ({"patch_setter": lambda a, i, c: a[:, :2], "index_axis_names": ("layer", "pos")}, "a version has shape"),
        (
            {"patch_setter": lambda a, i, c: None, "index_axis_names": ("layer", "pos")},
            "patch_setter: returned NoneType",
        ),
    ):
        given = {"clean_cache": cache, "patching_metric": metric, **options, **more}
        with pytest.raises(InputError, match=message):
            ours.generic_activation_patch(model, tokens, **given)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    for name in ("transformer_lens", "transformer_lens.utilities"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match="pip install transformer-lens"):
        ours.get_act_patch_resid_pre(None, torch.zeros(1, 2), {}, metric)
