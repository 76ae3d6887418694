"""The real packages, where they are installed (`make peers`): what one does with them gives the same when accelerated.

Sizes and gradients at large are in benchmarks/peer_autoencoders.py.
"""

import copy
import os
import warnings

import pytest
import torch

import vaecirc_fast as vf
from vaecirc_fast import compat

if not torch.cuda.is_available():
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # on a CPU its decoder would want a GPU

D, M, K, B = 16, 120, 6, 24


@pytest.fixture(autouse=True)
def same_each_time():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


@pytest.fixture
def x():
    return torch.randn(B, D, generator=torch.Generator().manual_seed(7))


def pair(module):
    """One as its package makes it, with numbers that are no start's, and an accelerated twin."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.mul_(0.8 + 0.4 * torch.rand(p.shape[:1] + (1,) * (p.ndim - 1)))
            if p.ndim == 1:
                p.add_(0.2 if name == "threshold" else 0.1 * torch.randn(p.shape))
    twin = copy.deepcopy(module)
    sample = torch.randn(B, D) if getattr(module, "hook_z_reshaping_mode", False) is False else torch.randn(B, 4, 4)
    return module, twin, vf.accelerate(twin, sample=sample)


def quietly(call, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


def same(found, expected):
    if isinstance(expected, torch.Tensor):
        expected = expected.to_dense() if expected.is_sparse else expected
        torch.testing.assert_close(found.to_dense() if found.is_sparse else found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        same([found[k] for k in expected], list(expected.values()))
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            same(a, b)
    else:
        assert found == expected


# --- SAELens ---------------------------------------------------------------------------------------------------------

SAES = ["TopK", "TopKTraining", "BatchTopKTraining", "Standard", "StandardTraining", "JumpReLU", "JumpReLUTraining"]


def sae_of(name, **settings):
    pytest.importorskip("sae_lens")
    import sae_lens.saes as saes
    import sae_lens.saes.batchtopk_sae

    module = saes if hasattr(saes, f"{name}SAE") else sae_lens.saes.batchtopk_sae
    if "TopK" in name:
        settings = {"k": float(K) if "Batch" in name else K} | settings
    return getattr(module, f"{name}SAE")(getattr(module, f"{name}SAEConfig")(d_in=D, d_sae=M, **settings))


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("normalize_activations", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("name", SAES)
def test_settings_of_sae_lens(x, name, normalize_activations, apply_b_dec_to_input):
    settings = {"normalize_activations": normalize_activations, "apply_b_dec_to_input": apply_b_dec_to_input}
    for rescales in [False, True] if "TopK" in name else [None]:
        more = {} if rescales is None else {"rescale_acts_by_decoder_norm": rescales}
        sae, twin, report = pair(sae_of(name, **settings, **more))
        for given in (x, x.view(4, 6, D), x[0]):
            with torch.no_grad():
                same(twin.encode(given), sae.encode(given))
                same(twin(given), sae(given))
                same(twin.decode(twin.encode(given)), sae.decode(sae.encode(given)))
        assert not report.fallbacks


@pytest.mark.parametrize("name", SAES)
def test_hooks_of_sae_lens_see_what_they_saw(x, name):
    sae, twin, report = pair(sae_of(name))
    with torch.no_grad():
        expected = sae.run_with_cache(x)
        with pytest.warns(UserWarning, match="runs as its package has it: hook_sae_acts_pre has hooks"):
            found = twin.run_with_cache(x)
    same(found[0], expected[0])
    same(dict(found[1]), dict(expected[1]))
    assert report.fallbacks
    before = report.fallbacks.copy()
    with torch.no_grad():
        same(twin(x), sae(x))
    assert report.fallbacks == before


def ablate(value, hook):
    value[..., :40] = 0
    return value


@pytest.mark.parametrize("name", SAES)
@pytest.mark.parametrize("point", ["input", "acts_pre", "acts_post", "recons", "output"])
def test_hooks_of_sae_lens_change_what_they_changed(x, name, point):
    sae, twin, _ = pair(sae_of(name))
    hooks = [(f"hook_sae_{point}", lambda value, hook: value * 0.5 + 0.1)]
    for hook in (hooks, [(f"hook_sae_{point}", ablate)]):
        with torch.no_grad():
            same(quietly(twin.run_with_hooks, x.clone(), fwd_hooks=hook), sae.run_with_hooks(x.clone(), fwd_hooks=hook))


@pytest.mark.parametrize("name", SAES)
def test_error_terms_of_sae_lens(x, name):
    sae, twin, report = pair(sae_of(name))
    for module in (sae, twin):
        quietly(setattr, module, "use_error_term", True)
    with torch.no_grad():
        same(quietly(twin, x), sae(x))
        hook = [("hook_sae_acts_post", ablate)]
        same(quietly(twin.run_with_hooks, x, fwd_hooks=hook), sae.run_with_hooks(x, fwd_hooks=hook))
    assert ("forward", "use_error_term is on") in report.fallbacks


def test_heads_of_sae_lens():
    pytest.importorskip("sae_lens")
    from sae_lens.saes.sae import SAEMetadata

    settings = {"reshape_activations": "hook_z", "metadata": SAEMetadata(hook_name="blocks.0.attn.hook_z")}
    with pytest.raises(vf.errors.InputError, match="sample: give one"):
        vf.accelerate(sae_of("TopK", **settings))
    torch.manual_seed(0)
    sae = sae_of("TopK", **settings)
    torch.manual_seed(0)
    twin = sae_of("TopK", **settings)
    z = torch.randn(B, 4, 4)
    vf.accelerate(twin, sample=z)
    with torch.no_grad():
        same(twin(z), sae(z))
        assert twin(z).shape == z.shape


@pytest.mark.parametrize("dead", [None, 0, 30])
@pytest.mark.parametrize("name", [name for name in SAES if "Training" in name])
def test_training_of_sae_lens(x, name, dead):
    sae, twin, report = pair(sae_of(name))
    from sae_lens.saes.sae import TrainStepInput

    mask = None if dead is None else torch.arange(M) < dead
    outs = []
    for module in (sae, twin):
        out = module.training_forward_pass(TrainStepInput(x.clone(), {"l1": 0.1, "l0": 0.01}, mask, 0, False))
        out.loss.backward()
        grads = {n: p.grad for n, p in module.named_parameters()}
        outs.append((out.sae_out, out.feature_acts, out.hidden_pre, out.loss, out.losses, grads))
    same(outs[1], outs[0])
    assert not report.fallbacks
    if "Batch" in name:
        same(twin.topk_threshold, sae.topk_threshold)


@pytest.mark.parametrize("name", ["TopK", "TopKTraining", "BatchTopKTraining"])
def test_gradients_of_codes_in_sae_lens(x, name):
    sae, twin, _ = pair(sae_of(name))
    found = []
    for module in (sae, twin):
        codes = module.encode(x)
        found.append(torch.autograd.grad(module.decode(codes).square().sum(), codes)[0])
    same(found[1], found[0])


@pytest.mark.parametrize("name", ["TopKTraining", "BatchTopKTraining"])
def test_backward_hooks_of_sae_lens(x, name):
    sae, twin, _ = pair(sae_of(name))
    from sae_lens.saes.sae import TrainStepInput

    seen = []
    for module in (sae, twin):
        module.hook_sae_acts_post.add_hook(lambda grad, hook: seen.append(grad), dir="bwd")
        given = TrainStepInput(x.clone(), {}, None, 0, False)
        quietly(module.training_forward_pass, given).loss.backward()
    assert len(seen) == 2
    same(seen[1], seen[0])


def test_what_is_changed_later_in_sae_lens(x):
    sae, twin, report = pair(sae_of("TopK"))
    for module in (sae, twin):
        module.activation_fn.k = 3
    with torch.no_grad():
        same(twin(x), sae(x))
        assert not report.fallbacks and bool(((twin.encode(x) != 0).sum(1) <= 3).all())
        for module in (sae, twin):
            module.activation_fn = torch.nn.ReLU()
        same(quietly(twin, x), sae(x))
    assert ("forward", "activation_fn is ReLU") in report.fallbacks
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        same(quietly(twin, x), sae(x))


def test_sparse_activations_of_sae_lens(x):
    sae, twin, report = pair(sae_of("TopKTraining", use_sparse_activations=True))
    assert "use_sparse_activations" in report.left["encode"]
    with torch.no_grad():
        same(twin.encode(x), sae.encode(x))
        same(twin(x), sae(x))


def test_others_of_sae_lens_are_refused():
    pytest.importorskip("sae_lens")
    from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )

    with pytest.raises(vf.errors.InputError, match="GatedSAE is not known"):
        vf.accelerate(GatedSAE(GatedSAEConfig(d_in=D, d_sae=M)))
    config = MatryoshkaBatchTopKTrainingSAEConfig(d_in=D, d_sae=M, k=K, matryoshka_widths=[30, M])
    with pytest.raises(vf.errors.InputError, match="has its own training_forward_pass"):
        vf.accelerate(MatryoshkaBatchTopKTrainingSAE(config))


@pytest.mark.parametrize("name", ["TopK", "Standard", "JumpReLU"])
def test_files_of_sae_lens(tmp_path, x, name):
    sae, _, _ = pair(sae_of(name))
    sae.save_model(tmp_path / "theirs")
    compat.sae_lens.save(tmp_path / "ours", compat.sae_lens.load(tmp_path / "theirs"))
    again = type(sae).load_from_disk(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(x), sae(x))


@pytest.mark.parametrize("name", ["TopKTraining", "BatchTopKTraining", "JumpReLUTraining", "StandardTraining"])
def test_files_of_training_in_sae_lens(tmp_path, name):
    sae, _, _ = pair(sae_of(name))
    sae.save_inference_model(tmp_path / "inference")
    sae.save_model(tmp_path / "training")
    ours, theirs = (compat.sae_lens.load(tmp_path / folder) for folder in ("training", "inference"))
    for part in ("w_enc", "b_enc", "w_dec", "b_dec"):
        same(getattr(ours, part), getattr(theirs, part))


# --- dictionary_learning ---------------------------------------------------------------------------------------------


def dictionary(name):
    pytest.importorskip("dictionary_learning")
    from dictionary_learning.dictionary import AutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    makers = {c.__name__: c for c in (AutoEncoder, JumpReluAutoEncoder, BatchTopKSAE, AutoEncoderTopK)}
    return makers[name](D, M, K) if "TopK" in name else makers[name](D, M)


DICTIONARIES = ["AutoEncoder", "JumpReluAutoEncoder", "BatchTopKSAE", "AutoEncoderTopK"]


@pytest.mark.parametrize("name", DICTIONARIES)
def test_calls_of_dictionary_learning(x, name):
    ae, twin, report = pair(dictionary(name))
    flags = {"AutoEncoderTopK": ["use_threshold"], "BatchTopKSAE": ["use_threshold", "return_active"]}
    for threshold in (-1.0, 0.4):
        if "TopK" in name:
            for module in (ae, twin):
                module.threshold.fill_(threshold)
        with torch.no_grad():
            for given in (x, x.view(4, 6, D)):
                same(twin.encode(given), ae.encode(given))
                same(twin(given), ae(given))
                same(twin(given, output_features=True), ae(given, output_features=True))
                same(twin.decode(twin.encode(given)), ae.decode(ae.encode(given)))
            for flag in flags.get(name, []):
                for value in (False, True):
                    same(twin.encode(x, **{flag: value}), ae.encode(x, **{flag: value}))
    assert not report.fallbacks
    if name == "JumpReluAutoEncoder":
        same(quietly(twin.encode, x, output_pre_jump=True), ae.encode(x, output_pre_jump=True))
        for module in (ae, twin):
            module.apply_b_dec_to_input = True
        same(twin(x), ae(x))
    if name == "AutoEncoder":
        mask = torch.ones(M)
        same(twin(x, ghost_mask=mask), ae(x, ghost_mask=mask))
    if name == "BatchTopKSAE":
        given = x.view(4, 6, D)
        same(quietly(twin.encode, given, use_threshold=False), ae.encode(given, use_threshold=False))
        assert ("encode", "BatchTopK of an input of 3 dimensions") in report.fallbacks


def test_the_entries_of_dictionary_learning(x):
    ae, twin, _ = pair(dictionary("AutoEncoderTopK"))
    (codes, values, indices, acts), expected = twin.encode(x, return_topk=True), ae.encode(x, return_topk=True)
    same((codes, acts), (expected[0], expected[3]))
    assert indices.dtype == torch.int64 and torch.equal(indices, expected[2].sort(1).values)
    same(values, acts.gather(1, indices))
    quietly(twin.encode, x, return_topk=True, use_threshold=True)


def test_hooks_of_dictionary_learning(x):
    ae, twin, report = pair(dictionary("AutoEncoderTopK"))
    seen = []
    for module in (ae, twin):
        module.encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with pytest.warns(UserWarning, match="encoder has hooks"):
        same(twin(x), ae(x))
    same(seen[1], seen[0])
    twin.encoder = torch.nn.Sequential(twin.encoder)
    quietly(twin, x)
    assert ("forward", "encoder was replaced by Sequential") in report.fallbacks


@pytest.mark.parametrize("name", DICTIONARIES)
def test_files_of_dictionary_learning(tmp_path, x, name):
    ae, _, _ = pair(dictionary(name))
    torch.save(ae.state_dict(), tmp_path / "theirs.pt")
    found = compat.dictionary_learning.load(tmp_path / "theirs.pt")
    compat.dictionary_learning.save(tmp_path / "ours.pt", found)
    again = dictionary(name)
    again.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(again(x), ae(x))


# --- sparsify --------------------------------------------------------------------------------------------------------


def coder(**settings):
    pytest.importorskip("sparsify")
    from sparsify import SparseCoder, SparseCoderConfig

    return SparseCoder(D, SparseCoderConfig(num_latents=M, k=K, **settings))


@pytest.mark.parametrize("dead", [None, 0, 3, 60])
@pytest.mark.parametrize(
    "settings",
    [{}, {"transcode": True}, {"skip_connection": True}, {"multi_topk": True}, {"activation": "groupmax"}],
    ids=str,
)
def test_calls_of_sparsify(x, settings, dead):
    module, twin, report = pair(coder(**settings))
    mask = None if dead is None else torch.arange(M) < dead
    target = x.flip(0) if settings.get("transcode") else None

    def results(module, given, y):
        out = module(given, y, dead_mask=mask)
        acts = torch.zeros(*given.shape[:-1], M).scatter(-1, out.latent_indices, out.latent_acts)
        return out.sae_out, acts, out.fvu, out.auxk_loss, out.multi_topk_fvu

    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            same(results(twin, x, target), results(module, x, target))
            assert isinstance(twin(x), type(module(x))) and twin(x).latent_indices.dtype == torch.int64
            found, expected = twin.encode(x), module.encode(x)
            same(found.pre_acts, expected.pre_acts)
            same(twin.decode(found.top_acts, found.top_indices), module.decode(expected.top_acts, expected.top_indices))
            same(twin(x, total_variance=torch.tensor(3.0)).fvu, module(x, total_variance=torch.tensor(3.0)).fvu)
    assert not report.fallbacks


def test_sparsify_under_autocast(x):
    module, twin, _ = pair(coder())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = twin.encode(x), module.encode(x)
        assert found.top_acts.dtype == expected.top_acts.dtype == torch.bfloat16
        same(found.pre_acts, expected.pre_acts)
        assert twin(x).sae_out.dtype == module(x).sae_out.dtype


def test_files_of_sparsify(tmp_path, x):
    module, _, _ = pair(coder())
    module.save_to_disk(tmp_path / "theirs")
    compat.sparsify.save(tmp_path / "ours", compat.sparsify.load(tmp_path / "theirs"))
    again = type(module).load_from_disk(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(x).sae_out, module(x).sae_out)


# --- OpenAI ----------------------------------------------------------------------------------------------------------


def openai(k=K, **settings):
    model = pytest.importorskip("sparse_autoencoder.model")
    activation = model.TopK(k) if k else torch.nn.ReLU()
    return model.Autoencoder(M, D, activation, **settings)


@pytest.mark.parametrize("k", [K, None])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_calls_of_openai(x, k, tied, normalize):
    ae, twin, report = pair(openai(k, tied=tied, normalize=normalize))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            same(twin(x), ae(x))
            same(twin.encode(x), ae.encode(x))
            same(twin.decode(*twin.encode(x)), ae.decode(*ae.encode(x)))
    same(twin.stats_last_nonzero, ae.stats_last_nonzero)
    assert set(twin.state_dict()) == set(ae.state_dict()) and not report.fallbacks
    found = []
    for module in (ae, twin):
        (module(x)[2] - x).square().mean().backward()
        found.append({n: p.grad for n, p in module.named_parameters()})
    same(found[1], found[0])


@pytest.mark.parametrize("k", [K, None])
def test_files_of_openai(tmp_path, x, k):
    ae, _, _ = pair(openai(k, normalize=bool(k)))
    torch.save(ae.state_dict(), tmp_path / "theirs.pt")
    compat.openai.save(tmp_path / "ours.pt", compat.openai.load(tmp_path / "theirs.pt"))
    again = type(ae).from_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(again(x)[2], ae(x)[2])
