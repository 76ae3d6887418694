"""The files of other packages: there and back to the bit, by their own key names, and refusals that name the file."""

import json

import pytest
import safetensors.torch
import torch

from vaecirc_fast.compat import Weights, dictionary_learning, openai, sae_lens, sparsify
from vaecirc_fast.errors import InputError

M, D, K = 6, 4, 2
G = torch.Generator().manual_seed(0)


def weights(kind, **other):
    w_enc, w_dec, b_enc, b_dec = (torch.randn(s, generator=G) for s in ((M, D), (M, D), (M,), (D,)))
    return Weights(w_enc, b_enc, w_dec, b_dec, kind, **other)


THRESHOLDS = torch.rand(M, generator=G)
CASES = [
    (sae_lens, weights("topk", k=K), "folder"),
    (sae_lens, weights("topk", k=K, centred=False), "folder"),
    (sae_lens, weights("relu"), "folder"),
    (sae_lens, weights("jumprelu", threshold=THRESHOLDS), "folder"),
    (dictionary_learning, weights("topk", k=K), "ae.pt"),
    (dictionary_learning, weights("topk", k=K, threshold=torch.tensor(0.5)), "ae.pt"),
    (dictionary_learning, weights("relu"), "ae.pt"),
    (dictionary_learning, weights("relu", centred=False), "ae.pt"),
    (dictionary_learning, weights("jumprelu", threshold=THRESHOLDS, centred=False), "ae.pt"),
    (sparsify, weights("topk", k=K), "folder"),
    (sparsify, weights("topk", k=K, centred=False), "folder"),
    (openai, weights("topk", k=K, config={"normalize": True}), "6.pt"),
    (openai, weights("relu", config={"normalize": False}), "6.pt"),
]
NAMES = [f"{module.__name__.rpartition('.')[2]}-{w.kind}{'' if w.centred else '-off-centre'}" for module, w, _ in CASES]


def assert_same(found, given):
    for name in ("w_enc", "b_enc", "w_dec", "b_dec", "threshold"):
        ours, theirs = getattr(found, name), getattr(given, name)
        assert (ours is None and theirs is None) or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype), name
    assert (found.kind, found.centred, found.k) == (given.kind, given.centred, given.k)
    assert found.w_enc.is_contiguous() and found.w_dec.is_contiguous()


@pytest.mark.parametrize(("module", "given", "name"), CASES, ids=NAMES)
def test_there_and_back(tmp_path, module, given, name):
    module.save(tmp_path / name, given)
    found = module.load(tmp_path / name)
    assert_same(found, given)
    module.save(tmp_path / "again", found)
    assert_same(module.load(tmp_path / "again"), given)


def test_sixteen_bits_stay(tmp_path):
    given = weights("topk", k=K)
    for name in ("w_enc", "b_enc", "w_dec", "b_dec"):
        setattr(given, name, getattr(given, name).bfloat16())
    for module, name in ((sae_lens, "a"), (sparsify, "b"), (dictionary_learning, "c.pt")):
        module.save(tmp_path / name, given)
        assert_same(module.load(tmp_path / name), given)


def test_the_keys_are_the_packages_own(tmp_path):
    sae_lens.save(tmp_path / "s", weights("jumprelu", threshold=THRESHOLDS))
    tensors = safetensors.torch.load_file(tmp_path / "s" / "sae_weights.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        **{"W_enc": (D, M), "b_enc": (M,), "W_dec": (M, D), "b_dec": (D,), "threshold": (M,)}
    }
    config = json.loads((tmp_path / "s" / "cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"], config["dtype"]) == ("jumprelu", D, M, "float32")

    dictionary_learning.save(tmp_path / "ae.pt", weights("topk", k=K))
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        **{"encoder.weight": (M, D), "encoder.bias": (M,), "decoder.weight": (D, M), "b_dec": (D,)},
        **{"k": (), "threshold": ()},
    }
    assert state["k"].dtype == torch.int32 and float(state["threshold"]) == -1

    sparsify.save(tmp_path / "p", weights("topk", k=K))
    tensors = safetensors.torch.load_file(tmp_path / "p" / "sae.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        **{"encoder.weight": (M, D), "encoder.bias": (M,), "W_dec": (M, D), "b_dec": (D,)}
    }

    openai.save(tmp_path / "o.pt", weights("topk", k=K, config={"normalize": True}))
    state = torch.load(tmp_path / "o.pt", weights_only=True)
    assert state["activation_state_dict"] == {"k": K, "postact_fn": "ReLU"} and state["activation"] == "TopK"
    assert state["decoder.weight"].shape == (D, M) and state["latent_bias"].shape == (M,)


def test_norms_of_the_decoder_are_folded_in(tmp_path):
    given = weights("topk", k=K)
    sae_lens.save(tmp_path, given)
    config = json.loads((tmp_path / "cfg.json").read_text()) | {"rescale_acts_by_decoder_norm": True}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    found = sae_lens.load(tmp_path)
    norm = given.w_dec.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.w_enc, given.w_enc * norm)
    torch.testing.assert_close(found.b_enc, given.b_enc * norm[:, 0])
    torch.testing.assert_close(found.w_dec, given.w_dec / norm)
    assert found.config["rescale_acts_by_decoder_norm"] is False


def test_batch_topk(tmp_path):
    given = weights("batch_topk", k=K, threshold=torch.tensor(0.25))
    dictionary_learning.save(tmp_path / "ae.pt", given)
    assert dictionary_learning.load(tmp_path / "ae.pt").kind == "topk"  # the keys do not say
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKSAE"}}))
    assert_same(dictionary_learning.load(tmp_path), given)
    sae_lens.save(tmp_path / "s", given)
    found = sae_lens.load(tmp_path / "s")
    assert found.kind == "jumprelu" and torch.equal(found.threshold, torch.full((M,), 0.25))


def test_tied_weights_of_openai(tmp_path):
    given = weights("topk", k=K, config={"normalize": True})
    openai.save(tmp_path / "o.pt", given)
    state = torch.load(tmp_path / "o.pt", weights_only=True)
    del state["decoder.weight"]
    torch.save(state | {"decoder.linear.weight": state["encoder.weight"]}, tmp_path / "o.pt")
    found = openai.load(tmp_path / "o.pt")
    assert torch.equal(found.w_dec, given.w_enc) and found.w_dec.data_ptr() != found.w_enc.data_ptr()


# --- refusals --------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("module", [dictionary_learning, openai])
def test_nothing_is_unpickled(tmp_path, module, capsys):
    torch.save({"encoder.weight": Evil()}, tmp_path / "ae.pt")
    with pytest.raises(InputError, match=r"ae.pt is no file of tensors that torch.load\(weights_only=True\) reads"):
        module.load(tmp_path / "ae.pt")
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("module", [sae_lens, dictionary_learning, sparsify, openai])
@pytest.mark.parametrize("content", [None, b"", b"no file of tensors" * 10])
def test_a_missing_or_damaged_file_is_named(tmp_path, module, content):
    folder = module in (sae_lens, sparsify)
    path = tmp_path / ("folder" if folder else "ae.pt")
    given = next(w for m, w, _ in CASES if m is module)
    if content is not None:
        module.save(path, given)
        of = {sae_lens: "sae_weights.safetensors", sparsify: "sae.safetensors"}.get(module)
        (path / of if of else path).write_bytes(content)
    with pytest.raises(InputError, match=str(path)):
        module.load(path)


def _rewritten(path, **changes):
    config = json.loads((path / "cfg.json").read_text()) | changes
    (path / "cfg.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("module", "changes", "says"),
    [
        (sae_lens, {"architecture": "gated"}, "architecture 'gated' is not known; known: topk"),
        (sae_lens, {"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm' is done at run time"),
        (sae_lens, {"k": 2.5}, "expected a whole number k > 0, got 2.5"),
        (sparsify, {"activation": "groupmax"}, "activation 'groupmax' is not supported"),
        (sparsify, {"k": 0}, "expected a whole number k > 0, got 0"),
    ],
)
def test_a_model_that_is_another_is_refused(tmp_path, module, changes, says):
    module.save(tmp_path, weights("topk", k=K))
    _rewritten(tmp_path, **changes)
    with pytest.raises(InputError, match=says):
        module.load(tmp_path)


def test_missing_keys_and_wrong_shapes_are_named(tmp_path):
    torch.save({"encoder.weight": torch.zeros(M, D), "r_mag": torch.zeros(M)}, tmp_path / "ae.pt")
    with pytest.raises(InputError, match="no tensor encoder.bias, decoder.weight; it has encoder.weight, r_mag"):
        dictionary_learning.load(tmp_path / "ae.pt")
    torch.save([1], tmp_path / "ae.pt")
    with pytest.raises(InputError, match="expected a state_dict, got list"):
        dictionary_learning.load(tmp_path / "ae.pt")
    given = weights("topk", k=K)
    with pytest.raises(InputError, match=r"w_dec: expected \(6, 4\) for w_enc \(6, 4\), got \(4, 6\)"):
        Weights(given.w_enc, given.b_enc, given.w_dec.T, given.b_dec)
    with pytest.raises(InputError, match=r"threshold: expected \(\) or \(6,\), got \(2,\)"):
        Weights(given.w_enc, given.b_enc, given.w_dec, given.b_dec, threshold=torch.zeros(2))


@pytest.mark.parametrize(
    ("module", "given", "says"),
    [
        (sae_lens, weights("topk"), "weights.k"),
        (sae_lens, weights("jumprelu"), "weights.threshold"),
        (sae_lens, weights("unknown"), "weights.kind"),
        (dictionary_learning, weights("topk"), "weights.k"),
        (dictionary_learning, weights("topk", k=K, centred=False), "weights.centred"),
        (dictionary_learning, weights("topk", k=K, threshold=THRESHOLDS), "weights.threshold: expected one"),
        (dictionary_learning, weights("jumprelu"), "weights.threshold"),
        (dictionary_learning, weights("unknown"), "weights.kind"),
        (sparsify, weights("relu"), "weights.kind"),
        (openai, weights("topk", config={"normalize": True}), "weights.k"),
        (openai, weights("topk", k=K), "weights.config"),
        (openai, weights("jumprelu", threshold=THRESHOLDS), "weights.kind"),
    ],
)
def test_what_a_package_cannot_hold_is_refused(tmp_path, module, given, says):
    with pytest.raises(InputError, match=says):
        module.save(tmp_path / "file", given)
    assert not list(tmp_path.iterdir())
