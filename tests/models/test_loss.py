"""The objectives against torch.distributions and against numerical differentiation."""

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from vaecirc_fast import models
from vaecirc_fast.errors import InputError
from vaecirc_fast.models.vae import sample_posterior

SHAPE = (2, 9, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def expected_terms(model, x, beta):
    mu, logvar = model.encode(x)
    posterior = Normal(mu, torch.exp(0.5 * logvar))
    noise = torch.randn(mu.shape, generator=seeded(), dtype=mu.dtype)
    z = posterior.mean + posterior.stddev * noise
    y = model.decode(z)
    pixels = Bernoulli(y) if model.likelihood == "bernoulli" else Normal(y, torch.ones_like(y))
    nll = -pixels.log_prob(x).sum((1, 2, 3)).mean()
    kl = beta * kl_divergence(posterior, Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(1).mean()
    return {"loss": nll + kl, "reconstruction": nll, "kl": kl}


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("net", ["conv", "mlp"])
@pytest.mark.parametrize(
    ("name", "options", "beta"), [("vae", {}, 1), ("beta_vae", {}, 4), ("beta_vae", {"beta": 0.5}, 0.5)]
)
def test_loss_is_the_negative_elbo(name, options, beta, net, likelihood):
    torch.manual_seed(1)
    model = models.build(name, SHAPE, 5, net=net, likelihood=likelihood, **options).double()
    with torch.no_grad():  # away from the prior, so that the KL term weighs
        model.encoder.mu.weight.mul_(30)
        model.encoder.logvar.weight.mul_(30)
    x = torch.bernoulli(torch.full((6, *SHAPE), 0.4, dtype=torch.float64), generator=seeded())
    terms = model.loss(x, generator=seeded())
    assert list(terms) == ["loss", "reconstruction", "kl"] and all(t.shape == () for t in terms.values())
    assert terms["kl"] > 0.1
    torch.testing.assert_close(terms, expected_terms(model, x, beta))
    torch.testing.assert_close(terms["loss"], sum(value for name, value in terms.items() if name != "loss"))


def test_kl_closed_form():
    """KL(N(m, s^2) || N(0, 1)) = (m^2 + s^2 - 1 - log s^2) / 2, exact to the last bits near the prior as well."""
    mu = torch.tensor([[0.0, 1.0, -2.0, 0.0]], dtype=torch.float64)
    logvar = torch.tensor([[0.0, 0.0, torch.log(torch.tensor(4.0)).item(), 1e-6]], dtype=torch.float64)
    kl = models.kl_divergence(mu, logvar)
    expected = torch.tensor([[0.0, 0.5, 0.5 * (4 + 3 - torch.log(torch.tensor(4.0)).item()), 2.5e-13]])
    torch.testing.assert_close(kl[:, :3], expected[:, :3].double())
    assert kl[0, 3] == pytest.approx(2.5e-13, rel=1e-3)  # the naive exp(v) - 1 - v has lost half its digits here


def test_gradients_against_finite_differences():
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = models.build("beta_vae", (1, 2, 2), 2, net="mlp", width=3 / 256, beta=2.0).double()

        def forward(self, x):
            return self.model.loss(x, generator=seeded())["loss"]

    torch.manual_seed(3)
    loss = Loss()
    x = torch.rand(2, 1, 2, 2, dtype=torch.float64)
    names, parameters = zip(*loss.named_parameters(), strict=True)

    def function(*values):
        return torch.func.functional_call(loss, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, parameters)


def test_all_randomness_comes_from_the_generator():
    model = models.build("vae", SHAPE)
    x = torch.rand(4, *SHAPE)
    before = torch.get_rng_state()
    first, second, other = (model.loss(x, generator=seeded(s))["loss"] for s in (0, 0, 1))
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), before)


def test_forward_samples_in_training_mode_only():
    model = models.build("vae", SHAPE)
    x = torch.rand(4, *SHAPE)
    sampled = model(x, generator=seeded(0))
    assert torch.equal(sampled, model(x, generator=seeded(0))) and not torch.equal(
        sampled, model(x, generator=seeded(1))
    )
    model.eval()
    assert torch.equal(model(x), model.decode(model.encode(x)[0]))


def test_sample_posterior_has_the_right_moments():
    mu, logvar = torch.tensor([[1.0, -2.0]]).expand(200_000, 2), torch.tensor([[0.0, 2.0]]).expand(200_000, 2)
    z = sample_posterior(mu, logvar, seeded())
    standard_error = torch.exp(0.5 * logvar[0]) / 200_000**0.5
    assert (z.mean(0) - mu[0]).abs().le(4 * standard_error).all()
    assert (z.var(0) / logvar[0].exp() - 1).abs().le(4 * (2 / 200_000) ** 0.5).all()


def test_losses_stay_float32_under_autocast():
    model = models.build("vae", SHAPE)
    x = torch.rand(4, *SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.decoder.logits(torch.zeros(4, 10))
        mu, logvar = model.encode(x)
        terms = model.loss(x, generator=seeded())
    assert logits.dtype == torch.bfloat16  # or this test shows nothing
    assert mu.dtype == logvar.dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in terms.values())
    # outside autocast, which may itself widen the cross-entropy: the loss must not depend on that
    nll = model.terms(x, logits, mu, mu, logvar)["reconstruction"]
    torch.testing.assert_close(nll, Bernoulli(logits=logits.float(), validate_args=False).log_prob(x).sum() / -4)


def test_trials_count_every_binary_pixel():
    """A grey value as the mean of 16 binary pixels: their joint likelihood, up to the binomial coefficient."""
    torch.manual_seed(0)
    model = models.build("vae", SHAPE, trials=16).double()
    pixels = torch.bernoulli(torch.full((16, 1, *SHAPE), 0.3, dtype=torch.float64), generator=seeded())
    mu, logvar = model.encode(pixels.mean(0))
    logits = model.decoder.logits(mu)
    terms = model.terms(pixels.mean(0), logits, mu, mu, logvar)
    torch.testing.assert_close(terms["reconstruction"], -Bernoulli(logits=logits).log_prob(pixels).sum())
    assert models.build(**model.config()).trials == 16


# --- constant sigma --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma, expected", [(0.5, [0.5] * 3), ((0.1, 1.0, 2.0), [0.1, 1.0, 2.0])])
def test_a_constant_sigma_takes_the_place_of_the_encoders(sigma, expected, tmp_path):
    model = models.build("beta_vae", (1, 8, 8), latents=3, net="mlp", sigma=sigma)
    x = torch.rand(5, 1, 8, 8)
    mu, logvar = model.encode(x)
    assert torch.exp(0.5 * logvar).detach().numpy() == pytest.approx(torch.tensor([expected] * 5).numpy())
    assert torch.equal(mu, model.encoder(x)[0])
    model.loss(x)["loss"].backward()
    assert model.encoder.mu.weight.grad is not None and model.encoder.logvar.weight.grad is None
    models.save(model, tmp_path / "m.safetensors")
    again = models.load(tmp_path / "m.safetensors")
    assert again.config() == model.config() and again.sigma == tuple(expected)
    assert torch.equal(again.encode(x)[1], logvar)
    assert "sigma" not in models.build("vae", (1, 8, 8), latents=3, net="mlp").config()


@pytest.mark.parametrize("sigma", [0.0, -1, (0.5, 0.5), "small", (1.0, 1.0, float("nan"))])
def test_a_sigma_that_is_none(sigma):
    with pytest.raises(InputError, match="sigma"):
        models.build("vae", (1, 8, 8), latents=3, net="mlp", sigma=sigma)
