"""Training of every architecture: its paper's updates, resumed to the bit, told the step and the data's size."""

import pytest
import torch
from training.blobs import Blobs

from vaecirc_fast import models
from vaecirc_fast._tensor_files import read_tensors
from vaecirc_fast.errors import InputError
from vaecirc_fast.models.discriminator import permute_dimensions
from vaecirc_fast.models.vae import sample_posterior
from vaecirc_fast.training import fit
from vaecirc_fast.training.checkpoints import CHECKPOINT, MODEL
from vaecirc_fast.training.loop import step_seed
from vaecirc_fast.training.schedules import learning_rate

OPTIONS = {
    "annealed_vae": {"gamma": 3.0, "capacity": 2.0, "anneal_steps": 5},
    "factor_vae": {"gamma": 5.0, "hidden": 16, "discriminator_lr": 5e-3},
    "beta_tcvae": {"beta": 3.0, "weights": "mss"},
    "dip_vae_i": {"lambda_od": 2.0, "lambda_d": 3.0},
    "dip_vae_ii": {"lambda_od": 2.0, "lambda_d": 3.0},
    "vq_vae": {"codes": 6, "code_width": 2},  # its codebook moves within the loss, and is no parameter
}


def new_model(name, seed=0, net="mlp", **options):
    torch.manual_seed(seed)
    return models.build(name, (1, 16, 16), 4, net=net, **{"width": 0.1, **OPTIONS[name], **options})


def train(model, ds=None, **options):
    defaults = {"steps": 8, "batch_size": 8, "checkpoint_every": 3, "log_every": 1, "progress": False}
    return fit(model, ds or Blobs(), **{**defaults, **options})


class Stopped(Blobs):
    """Blobs that stops the run like Ctrl-C when it is asked for the n-th batch."""

    def __init__(self, at):
        super().__init__()
        self.calls, self.at = 0, at

    def sample(self, n, generator=None):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return super().sample(n, generator)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("precision", "net"), [("fp32", "mlp"), ("bf16", "conv")])
def test_interrupted_runs_end_bit_identical(name, precision, net, tmp_path):
    """Stopped within the annealing and after it; the adversary's moments and rate are resumed too."""
    options = {"precision": precision, "schedule": "cosine", "warmup": 2}
    undisturbed = train(new_model(name, net=net), out=tmp_path / "a", **options)
    for at, seed in ((3, 0), (5, 1)):  # the second goes on from a checkpoint, so its own weights do not matter
        with pytest.raises(KeyboardInterrupt):
            train(new_model(name, seed, net), Stopped(at), out=tmp_path / "b", **options)
    resumed = train(new_model(name, seed=9, net=net), out=tmp_path / "b", **options)
    assert resumed.history.equals(undisturbed.history) and len(resumed.history) == 8
    for file in (MODEL, CHECKPOINT):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def documented_step(model, step, seed=0, batch=8):
    """The images of a step and the generator that its noise comes from."""
    generator = torch.Generator().manual_seed(step_seed(seed, step))
    x, _ = Blobs().sample(model.batches * batch, generator=generator)
    return x.double(), generator


def test_factor_vae_trains_as_its_algorithm_says():
    """Three steps against plain torch with two optimizers: the VAE's, through the discriminator as it was before the
    step, then the discriminator's own. Warmup lowers both rates alike."""
    mine, theirs = new_model("factor_vae").double(), new_model("factor_vae").double()
    train(mine, steps=3, schedule="linear", warmup=1, lr=2e-3)
    judge = theirs.discriminator
    vae = torch.optim.Adam([*theirs.encoder.parameters(), *theirs.decoder.parameters()])
    adversary = torch.optim.Adam(judge.parameters(), betas=(0.5, 0.9))
    for step in range(3):
        x, generator = documented_step(theirs, step)
        share = learning_rate(step, lr=1.0, steps=3, schedule="linear", warmup=1)
        vae.param_groups[0]["lr"], adversary.param_groups[0]["lr"] = 2e-3 * share, 5e-3 * share
        mu, logvar = theirs.encode(x[:8])
        z = sample_posterior(mu, logvar, generator)
        other = permute_dimensions(sample_posterior(*theirs.encode(x[8:]), generator), generator).detach()
        logits = judge(z)
        elbo = sum(theirs.terms(x[:8], theirs.decoder.logits(z), z, mu, logvar).values())
        of_vae = torch.autograd.grad(
            elbo + 5.0 * (logits[:, 0] - logits[:, 1]).mean(), vae.param_groups[0]["params"], retain_graph=True
        )
        of_z, of_other = judge(z.detach()).log_softmax(1)[:, 0], judge(other).log_softmax(1)[:, 1]
        of_judge = torch.autograd.grad(-(of_z.mean() + of_other.mean()) / 2, adversary.param_groups[0]["params"])
        for optimizer, gradients in ((vae, of_vae), (adversary, of_judge)):
            for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict())


def test_capacity_rises_with_the_step():
    """Against plain torch with the capacity written out, over the end of the annealing."""
    mine, theirs = new_model("annealed_vae").double(), new_model("annealed_vae").double()
    run = train(mine)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-3)
    for step, capacity in enumerate([0.0, 0.4, 0.8, 1.2, 1.6, 2.0, 2.0, 2.0]):
        x, generator = documented_step(theirs, step)
        mu, logvar = theirs.encode(x)
        z = sample_posterior(mu, logvar, generator)
        terms = theirs.terms(x, theirs.decoder.logits(z), z, mu, logvar)
        term = 3.0 * (terms["kl"] - capacity).abs()
        assert run.history["capacity"][step] == pytest.approx(term.item())
        optimizer.zero_grad()
        (terms["reconstruction"] + term).backward()
        optimizer.step()
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict())


def test_the_data_set_says_its_size(tmp_path):
    model = new_model("beta_tcvae")
    assert model.config()["dataset_size"] is None
    train(model, out=tmp_path)
    assert model.config()["dataset_size"] == 192 and models.load(tmp_path / MODEL).dataset_size == 192
    assert read_tensors(tmp_path / CHECKPOINT, "checkpoint", "")[1]["settings"]["model"]["dataset_size"] == 192
    train(new_model("beta_tcvae", dataset_size=192), steps=1)
    with pytest.raises(InputError, match="dataset_size: the model says 191, but the data set has 192 images"):
        train(new_model("beta_tcvae", dataset_size=191))
    with pytest.raises(InputError, match="dataset_size: expected at least the 193 samples of the minibatch, got 192"):
        train(new_model("beta_tcvae"), batch_size=193)


def test_other_options_are_named(tmp_path):
    train(new_model("factor_vae"), out=tmp_path, steps=1)
    with pytest.raises(InputError, match="model discriminator_lr 0.005 there, 0.001 here"):
        train(new_model("factor_vae", discriminator_lr=1e-3), out=tmp_path)


def test_a_frozen_adversary_stays_and_the_rest_trains():
    model = new_model("factor_vae")
    model.discriminator.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, steps=2)
    moved = {name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"encoder", "decoder"}


def test_images_per_second_count_the_first_batch(monkeypatch):
    seconds = iter([10.0, 14.0])
    monkeypatch.setattr("vaecirc_fast.training.loop.time.perf_counter", lambda: next(seconds))
    assert train(new_model("factor_vae")).images_per_second == 8 * 8 / 4


# Mild ones: the whole loss of these images is 80 nats, so that strong ones rightly let every latent go.
LEARNING = {
    "annealed_vae": {"capacity": 8.0, "anneal_steps": 200},
    "factor_vae": {"gamma": 2.0},
    "beta_tcvae": {"beta": 1.5, "weights": "mws"},
    "dip_vae_i": {"lambda_od": 0.5, "lambda_d": 0.5},
    "dip_vae_ii": {"lambda_od": 0.5, "lambda_d": 0.5},
    "vq_vae": {"codes": 64, "code_width": 4},
}


@pytest.mark.deep
@pytest.mark.parametrize("name", OPTIONS)
def test_it_learns(name):
    """Well below what a decoder that ignores its latents can reach: the cross-entropy of the mean image."""
    ds = Blobs()
    mean = ds.images(range(len(ds))).mean(0)
    mean_image_loss = torch.special.entr(torch.stack([mean, 1 - mean])).sum().item()
    model = new_model(name, width=0.5, **LEARNING[name])
    run = train(model, ds, steps=400, batch_size=32, lr=1e-2, schedule="cosine", checkpoint_every=400)
    assert run.history["reconstruction"].iloc[-50:].mean() < 0.85 * mean_image_loss  # as a VAE in test_fit.py


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OPTIONS)
def test_interrupted_runs_end_bit_identical_on_a_gpu(name, tmp_path):
    undisturbed = train(new_model(name, net="conv").cuda())
    with pytest.raises(KeyboardInterrupt):
        train(new_model(name, net="conv").cuda(), Stopped(5), out=tmp_path)
    resumed = train(new_model(name, seed=9, net="conv").cuda(), out=tmp_path)
    assert resumed.history.equals(undisturbed.history)
    for (key, ours), theirs in zip(
        resumed.model.state_dict().items(), undisturbed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), key
