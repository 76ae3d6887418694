"""Modules from weights and back: the same reconstruction, whether or not the weights centre their input."""

import pytest
import torch

from vaecirc_fast import compat, nn
from vaecirc_fast.errors import InputError

D, M = 6, 20


def weights(kind, **options):
    g = torch.Generator().manual_seed(0)
    w_enc, b_enc, w_dec, b_dec = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((M, D), M, (M, D), D))
    return compat.Weights(w_enc, b_enc, w_dec, b_dec, kind=kind, **options)


def reconstruction(w, x):
    pre = (x - w.b_dec if w.centred else x) @ w.w_enc.T + w.b_enc
    acts = pre.relu()
    if w.kind == "topk":
        values, indices = acts.topk(w.k)
        acts = torch.zeros_like(acts).scatter(1, indices, values)
    elif w.threshold is not None:
        acts = pre * (pre > w.threshold)
    return acts @ w.w_dec + w.b_dec


KINDS = {
    "topk": {"k": 4},
    "batch_topk": {"k": 4, "threshold": torch.tensor(0.7, dtype=torch.float64)},
    "jumprelu": {"threshold": torch.linspace(0.1, 2, M, dtype=torch.float64)},
    "relu": {},
}


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_reconstructs_as_its_weights_do(kind, centred):
    w, x = weights(kind, centred=centred, **KINDS[kind]), torch.randn(9, D, dtype=torch.float64)
    sae = compat.to_module(w).eval()
    torch.testing.assert_close(sae(x).reconstruction, reconstruction(w, x), rtol=1e-6, atol=1e-6)
    again = compat.from_module(sae)
    assert again.kind == kind and again.k == w.k
    torch.testing.assert_close(reconstruction(again, x), reconstruction(w, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("package", ["sae_lens", "sparsify"])
def test_a_module_is_saved_as_a_package_has_it(package, tmp_path):
    sae, x = nn.TopKSAE(D, M, 4), torch.randn(9, D)
    files = getattr(compat, package)
    files.save(tmp_path / "sae", compat.from_module(sae))
    again = compat.to_module(files.load(tmp_path / "sae"))
    assert isinstance(again, nn.TopKSAE) and again.k == 4
    assert torch.equal(again(x).reconstruction, sae(x).reconstruction)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("unknown", {}, "kind 'unknown' says not which module"),
        ("topk", {}, "kind 'topk' needs k"),
        ("jumprelu", {}, "'jumprelu' needs thresholds above 0"),
        ("jumprelu", {"threshold": torch.tensor(0.0)}, "'jumprelu' needs thresholds above 0"),
        ("batch_topk", {"k": 3, "threshold": torch.ones(M)}, "one threshold for all latents"),
    ],
)
def test_what_is_missing_is_named(kind, options, message):
    with pytest.raises(InputError, match=message):
        compat.to_module(weights(kind, **options))


def test_other_modules_are_refused():
    with pytest.raises(InputError, match="sae: expected one of TopKSAE, BatchTopKSAE, JumpReLUSAE, L1SAE, got Linear"):
        compat.from_module(torch.nn.Linear(2, 2))
