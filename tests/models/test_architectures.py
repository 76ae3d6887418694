"""What every VAE of the family shares: nets and their sweeps, files, randomness, controls; and what it refuses."""

import math

import pytest
import torch
from models.zoo import OPTIONS, SHAPE, images, new_model, seeded

import vaecirc_fast as vf
from vaecirc_fast import models
from vaecirc_fast.errors import InputError
from vaecirc_fast.studies.control_models import half_frozen, of_constant_sigma, permuted, reinitialised

OWN = [name for name in OPTIONS if name != "vae"]


def test_the_family_is_complete():
    assert set(OPTIONS) <= set(models.names())


@pytest.mark.parametrize("name", OWN)
def test_sweeps_are_those_of_the_same_weights_in_a_vae(name):
    model, vae = new_model(name), new_model("vae", seed=5)
    vae.encoder.load_state_dict(model.encoder.state_dict())
    vae.decoder.load_state_dict(model.decoder.state_dict())
    x = images(12)
    with torch.no_grad():
        codes = [m.encode(x) for m in (model, vae)]
        assert torch.equal(codes[0][0], codes[1][0]) and torch.equal(codes[0][1], codes[1][1])
        swept = [vf.latent_sweep(m.decoder, codes[0][0], scale=vf.posterior_scale(m, x)) for m in (model, vae)]
    assert torch.equal(swept[0].tensor, swept[1].tensor)
    assert swept[0].ces().equals(swept[1].ces())


@pytest.mark.parametrize("name", OPTIONS)
def test_round_trip(name, tmp_path):
    model = new_model(name, sigma=0.5)
    models.save(model, tmp_path / "m.safetensors")
    again = models.load(tmp_path / "m.safetensors")
    assert type(again) is type(model) and again.config() == model.config()
    assert again.config().items() >= OPTIONS[name].items()
    ours, theirs = (m.loss(images(6), generator=seeded(), step=3) for m in (model, again))
    assert all(torch.equal(ours[term], theirs[term]) for term in ours)


@pytest.mark.parametrize("name", OPTIONS)
def test_all_randomness_comes_from_the_generator(name):
    model, x = new_model(name), images(6)
    before = torch.get_rng_state()
    first, second, other = (model.loss(x, generator=seeded(s))["loss"] for s in (0, 0, 1))
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", OPTIONS)
def test_without_gradients_the_terms_are_the_same(name):
    model, x = new_model(name), images(6)
    with torch.no_grad():
        evaluated = model.loss(x, generator=seeded())
    trained = model.loss(x, generator=seeded())
    assert not any(term.requires_grad for term in evaluated.values())
    assert all(torch.equal(evaluated[term], trained[term]) for term in trained)


@pytest.mark.parametrize("name", OPTIONS)
def test_controls_of_every_architecture(name):
    model = new_model(name)
    anew = reinitialised(model, seed=3)
    moved = {key for key, value in anew.state_dict().items() if not torch.equal(value, model.state_dict()[key])}
    assert moved == set(model.state_dict())
    twin = of_constant_sigma(model, torch.full((4,), 0.3), seed=3)
    assert type(twin) is type(model) and twin.config() == {**model.config(), "sigma": twin.config()["sigma"]}
    assert twin.encode(images(2))[1].exp().sqrt() == pytest.approx(0.3)
    twin.loss(images(4))["loss"].backward()
    assert permuted(model, 0).loss(images(8), generator=seeded())["loss"].isfinite()


def test_a_discriminator_trains_with_the_half_that_is_drawn_anew():
    model = new_model("factor_vae")
    twin = half_frozen(model, seed=3, anew="decoder")
    trains = {name.split(".")[0] for name, p in twin.named_parameters() if p.requires_grad}
    assert trains == {"decoder", "discriminator"}
    assert not torch.equal(twin.discriminator.fc1.weight, model.discriminator.fc1.weight)
    assert torch.equal(twin.encoder.fc1.weight, model.encoder.fc1.weight)
    twin.loss(images(4))["loss"].backward()
    assert all((p.grad is not None) == p.requires_grad for p in twin.parameters())


def test_the_discriminator_is_the_papers():
    model = models.build("factor_vae", (1, 64, 64))
    layers = [(layer.in_features, layer.out_features) for layer in model.discriminator.children()]
    assert layers == [(10, 1000), *[(1000, 1000)] * 5, (1000, 2)]
    vae, adversary = model.parameter_groups(1e-3)
    assert (vae["lr"], adversary["lr"], adversary["betas"]) == (1e-3, 1e-4, (0.5, 0.9)) and "betas" not in vae
    assert {*map(id, adversary["params"])} == {*map(id, model.discriminator.parameters())}
    assert len(vae["params"]) + len(adversary["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("annealed_vae", {"gamma": 0}, "gamma: expected a positive number, got 0"),
        ("annealed_vae", {"capacity": -1}, "capacity: expected a number of at least 0, got -1"),
        ("annealed_vae", {"capacity": "25"}, "capacity: expected a number of at least 0, got '25'"),
        ("annealed_vae", {"anneal_steps": 0}, "anneal_steps: expected an integer of at least 1, got 0"),
        ("annealed_vae", {"anneal_steps": 1e5}, "anneal_steps: expected an integer"),
        ("annealed_vae", {"beta": 2.0}, "unknown option beta of model 'annealed_vae'; known are gamma, capacity"),
        ("factor_vae", {"gamma": -1.0}, "gamma: expected a number of at least 0"),
        ("factor_vae", {"gamma": math.nan}, "gamma: expected a number of at least 0, got nan"),
        ("factor_vae", {"gamma": False}, "gamma: expected a number of at least 0, got False"),
        ("factor_vae", {"hidden": 0}, "hidden: expected an integer of at least 1"),
        ("factor_vae", {"discriminator_lr": 0}, "discriminator_lr: expected a positive number"),
        ("beta_tcvae", {"beta": 0}, "beta: expected a positive number"),
        ("beta_tcvae", {"weights": "mvs"}, "weights: unknown 'mvs'; known are mws, mss"),
        ("beta_tcvae", {"weights": None}, "weights: unknown None"),
        ("beta_tcvae", {"dataset_size": 0}, "dataset_size: expected an integer of at least 1"),
        ("dip_vae_i", {"lambda_od": -1}, "lambda_od: expected a number of at least 0"),
        ("dip_vae_ii", {"lambda_d": math.inf}, "lambda_d: expected a number of at least 0, got inf"),
        ("dip_vae_ii", {"lambda_dd": 1.0}, "unknown option lambda_dd of model 'dip_vae_ii'; known are lambda_od"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(InputError, match=message):
        models.build(name, SHAPE, **options)


def test_wrong_losses():
    with pytest.raises(InputError, match="x: factor_vae takes 2 batches of equal size at once, got 5 images"):
        new_model("factor_vae").loss(images(5))
    with pytest.raises(InputError, match="dataset_size: beta_tcvae needs the number of images"):
        new_model("beta_tcvae", dataset_size=None).loss(images(4))
    with pytest.raises(InputError, match="dataset_size: expected at least the 4 samples of the minibatch, got 3"):
        new_model("beta_tcvae", dataset_size=3, weights="mss").loss(images(4))
    for step in (-1, 1.5, True):
        with pytest.raises(InputError, match="step: expected the number of updates so far or None"):
            new_model("annealed_vae").loss(images(4), step=step)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_smallest_batch(name):
    """One image a batch: no covariance, no other posterior, nothing to permute; still finite, with finite gradients."""
    model = new_model(name)
    model.loss(images(model.batches))["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
