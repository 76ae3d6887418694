"""pythae's own models and trainer, where it is installed (`make peers`): measured as they come."""

import sys
from pathlib import Path

import pytest
import torch

import vaecirc_fast as vf
from vaecirc_fast.errors import InputError

pythae = pytest.importorskip("pythae.models")
EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"images": 40, "sweep_images": 6, "pairs": 6, "circuit_pairs": 3, "circuit_units": 4}


def test_the_example(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "pythae_model", raising=False)
    import pythae_model

    found = pythae_model.main(str(tmp_path), epochs=1, **SMALL)
    assert (tmp_path / "report.html").exists() and not found.left_out
    assert {row["site"] for row in found.result["circuits"]["sites"]} == {
        *("encoder.layers.0.0", "latents", "decoder.layers.0.0"),
    }


def test_reconstruction_is_that_of_pythae():
    """From pythae's own call of the whole model, not from its parts."""
    ds = vf.data.load("digits")
    torch.manual_seed(0)
    model = pythae.AE(pythae.AEConfig(input_dim=ds.shape, latent_dim=3)).eval()
    found = vf.studies.measure_model(model, ds, **SMALL, battery="none")
    x = vf.studies.judged.judged_images(ds, 40, vf.studies.examined.EVALUATION_SEED).x
    y = model.predict(x).recon_x.detach()
    kind = "bernoulli"
    loss, floor = vf.metrics.reconstruction_loss(x, y, kind), vf.metrics.loss_floor(x, kind)
    mean = vf.metrics.mean_image_loss(x, likelihood=kind)
    ratio = float((loss - floor).mean() / (mean - floor).mean())
    assert found.result["metrics"]["reconstruction"]["value"] == pytest.approx(ratio, rel=1e-6)


def test_quantised_codes_are_refused():
    ds = vf.data.load("digits")
    model = pythae.VQVAE(pythae.VQVAEConfig(input_dim=ds.shape, latent_dim=3))
    with pytest.raises(InputError, match="model: VQVAE quantises its codes"):
        vf.studies.measure_model(model, ds, **SMALL)
