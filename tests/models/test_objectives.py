"""The objectives of the VAE family: against their papers' formulas in numpy, planted cases, and where they coincide."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models.zoo import OPTIONS, SHAPE, LinearEncoder, images, new_model, seeded
from scipy.special import logsumexp
from scipy.stats import norm

from vaecirc_fast.models.discriminator import Discriminator, permute_dimensions
from vaecirc_fast.models.vae import sample_posterior

L = 4


def posteriors(model, x):
    """mu, sigma and the z that `loss` draws with `seeded()`, as numpy."""
    with torch.no_grad():
        mu, logvar = model.encode(x)
        z = sample_posterior(mu, logvar, seeded())
    return mu.numpy(), logvar.mul(0.5).exp().numpy(), z.numpy()


def numpy_elbo(model, x):
    """Negative log-likelihood and KL in nats per image, from their definitions."""
    mu, sigma, z = posteriors(model, x)
    with torch.no_grad():
        y = model.decode(torch.from_numpy(z)).numpy()
    nll = -np.where(x.numpy() == 1, np.log(y), np.log1p(-y)).sum() / len(x)
    return nll, (mu**2 + sigma**2 - 1 - 2 * np.log(sigma)).sum() / 2 / len(x)


def values(terms):
    return {name: term.item() for name, term in terms.items() if name != "loss"}


# --- against the papers' formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_the_terms_sum_to_the_loss(name):
    terms = new_model(name).loss(images(6), generator=seeded())
    assert all(term.shape == () and term.dtype == torch.float64 for term in terms.values())
    assert terms["loss"].item() == pytest.approx(sum(values(terms).values()), rel=1e-12)


@pytest.mark.parametrize(("step", "capacity"), [(0, 0.0), (1, 0.05), (5, 0.25), (10, 0.5), (11, 0.5), (None, 0.5)])
def test_annealed_capacity(step, capacity):
    model, x = new_model("annealed_vae"), images(6)
    nll, kl = numpy_elbo(model, x)
    expected = {"reconstruction": nll, "capacity": 3.0 * abs(kl - capacity)}
    assert values(model.loss(x, generator=seeded(), step=step)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", ["dip_vae_i", "dip_vae_ii"])
def test_dip_penalty(name):
    model, x = new_model(name), images(7)
    mu, sigma, _ = posteriors(model, x)
    covariance = np.cov(mu, rowvar=False, bias=True)
    if name == "dip_vae_ii":
        covariance += np.diag((sigma**2).mean(0))
    penalty = 0.0
    for i, j in itertools.product(range(L), range(L)):
        penalty += 3.0 * (covariance[i, i] - 1) ** 2 if i == j else 2.0 * covariance[i, j] ** 2
    nll, kl = numpy_elbo(model, x)
    expected = {"reconstruction": nll, "kl": kl, "covariance": penalty}
    assert values(model.loss(x, generator=seeded())) == pytest.approx(expected, rel=1e-10)


def log_densities(mu, sigma, z, weights):
    """log q(z_b) (B,) and log q(z_bl) (B, L) of the minibatch with weights (B, B)."""
    each = norm.logpdf(z[:, None], mu, sigma)
    return logsumexp(each.sum(2), axis=1, b=weights), logsumexp(each, axis=1, b=weights[:, :, None])


def weights_of(kind, M, N):
    if kind == "mws":
        return np.full((M, M), 1 / (N * M))
    return np.where(np.eye(M) == 1, 1 / N, (N - 1) / (N * (M - 1)))


@pytest.mark.parametrize("kind", ["mws", "mss"])
def test_total_correlation_of_a_minibatch(kind):
    model, x = new_model("beta_tcvae", weights=kind), images(6)
    joint, marginals = log_densities(*posteriors(model, x), weights_of(kind, 6, 100))
    nll, kl = numpy_elbo(model, x)
    expected = {"reconstruction": nll, "kl": kl, "total_correlation": 2.0 * (joint - marginals.sum(1)).mean()}
    assert values(model.loss(x, generator=seeded())) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", ["mws", "mss"])
def test_total_correlation_of_the_whole_data_set_is_exact(kind):
    """q(z) enumerated over all N images. MWS gives every density 1/N of it: log N too little in each of 1 + L logs."""
    N = 8
    model, x = new_model("beta_tcvae", weights=kind, dataset_size=N), images(N)
    mu, sigma, z = posteriors(model, x)
    exact = 0.0
    for b in range(N):
        density = np.array([norm.pdf(z[b], mu[n], sigma[n]) for n in range(N)])
        exact += (np.log(density.prod(1).mean()) - np.log(density.mean(0)).sum()) / N
    shift = (L - 1) * math.log(N) if kind == "mws" else 0.0
    assert values(model.loss(x, generator=seeded()))["total_correlation"] == pytest.approx(2.0 * (exact + shift))


def test_stratified_densities_are_unbiased_over_all_minibatches():
    """The mean of exp(log q(z_b)) over every minibatch that holds image b is q(z_b), and the copied matrix's is not."""
    from vaecirc_fast.ops import tc_logsumexp

    N, M = 6, 3
    model, x = new_model("beta_tcvae"), images(N)
    with torch.no_grad():
        mu, logvar = model.encode(x)
        z = sample_posterior(mu, logvar, seeded())
    sums, counts = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for batch in itertools.combinations(range(N), M):
        rows = list(batch)
        joint, _ = tc_logsumexp(z[rows], mu[rows], logvar[rows], kind="mss", dataset_size=N)
        sums[rows] += joint.exp()
        counts[rows] += 1
    m, s = mu.numpy(), logvar.mul(0.5).exp().numpy()
    exact = [np.mean([norm.pdf(z[b].numpy(), m[n], s[n]).prod() for n in range(N)]) for b in range(N)]
    assert (sums / counts).numpy() == pytest.approx(np.array(exact), rel=1e-10)


def test_beta_tcvae_is_the_papers_sum_of_three():
    """I(z; x) + beta TC + sum_l KL(q(z_l) || p(z_l)), sampled, is KL + (beta - 1) TC and noise of mean 0."""
    model, x = new_model("beta_tcvae", beta=4.0), images(6)
    with torch.no_grad():
        mu, logvar = model.encode(x)
        logits = model.decoder.logits(mu)
    m, s = mu.numpy(), logvar.mul(0.5).exp().numpy()
    generator, differences = seeded(), []
    for _ in range(150):
        z = sample_posterior(mu, logvar, generator)
        joint, marginals = log_densities(m, s, z.numpy(), weights_of("mws", 6, 100))
        information = norm.logpdf(z.numpy(), m, s).sum(1) - joint
        of_single = marginals.sum(1) - norm.logpdf(z.numpy()).sum(1)
        theirs = (information + 4.0 * (joint - marginals.sum(1)) + of_single).mean()
        ours = values(model.terms(x, logits, z, mu, logvar))
        differences.append(theirs - ours["kl"] - ours["total_correlation"])
    assert abs(np.mean(differences)) < 4 * np.std(differences) / math.sqrt(len(differences))


def plain_logits(discriminator, z):
    """The discriminator written out: six leaky layers and a linear one."""
    for k in range(1, 7):
        layer = getattr(discriminator, f"fc{k}")
        h = z @ layer.weight.T + layer.bias
        z = torch.where(h > 0, h, 0.2 * h)
    return z @ discriminator.logits.weight.T + discriminator.logits.bias


def test_factor_vae_terms():
    model, x = new_model("factor_vae"), images(10)
    first, second = x[:5], x[5:]
    nll, kl = numpy_elbo(model, first)
    generator = seeded()
    with torch.no_grad():
        z = sample_posterior(*model.encode(first), generator)
        other = permute_dimensions(sample_posterior(*model.encode(second), generator), generator)
        of_z, of_other = (plain_logits(model.discriminator, codes).softmax(1).numpy() for codes in (z, other))
    expected = {
        "reconstruction": nll,
        "kl": kl,
        "total_correlation": 2.0 * np.log(of_z[:, 0] / (1 - of_z[:, 0])).mean(),
        "discriminator": -(np.log(of_z[:, 0]).mean() + np.log(1 - of_other[:, 0]).mean()) / 2,
    }
    assert values(model.loss(x, generator=seeded())) == pytest.approx(expected, rel=1e-10)


def test_permuting_keeps_every_dimension_and_draws_orders_uniformly():
    z = torch.randn(50, 3, generator=seeded())
    permuted = permute_dimensions(z, seeded(1))
    assert torch.equal(permuted.sort(0).values, z.sort(0).values) and not torch.equal(permuted, z)
    small = torch.arange(3.0)[:, None].expand(3, 2)
    generator, counts = seeded(2), {}
    for _ in range(3600):
        key = tuple(permute_dimensions(small, generator).flatten().tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 36  # 3! orders of each of two columns, independent of one another
    assert sum((c - 100) ** 2 / 100 for c in counts.values()) < 35 + 4 * math.sqrt(70)  # chi-square of 35 degrees


# --- which gradients go where ----------------------------------------------------------------------------------------


def gradients(model, x):
    model.zero_grad(set_to_none=True)
    model.loss(x, generator=seeded())["loss"].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_each_player_has_the_gradient_of_its_own_loss():
    """One backward pass against two of plain torch: the VAE against a frozen discriminator, the discriminator alone."""
    model, x = new_model("factor_vae"), images(10)
    ours = gradients(model, x)
    frozen = copy.deepcopy(model).requires_grad_(False)
    for part in (frozen.encoder, frozen.decoder):
        part.requires_grad_(True)
    generator = seeded()
    mu, logvar = frozen.encode(x[:5])
    z = sample_posterior(mu, logvar, generator)
    other = permute_dimensions(sample_posterior(*frozen.encode(x[5:]), generator), generator).detach()
    log_ratio = plain_logits(frozen.discriminator, z) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    vae = sum(frozen.terms(x[:5], frozen.decoder.logits(z), z, mu, logvar).values()) + 2.0 * log_ratio.mean()
    vae.backward()
    adversary = copy.deepcopy(model.discriminator)
    logits = [plain_logits(adversary, codes) for codes in (z.detach(), other)]
    classes = [F.cross_entropy(of, torch.full((5,), k)) for k, of in enumerate(logits)]
    (0.5 * (classes[0] + classes[1])).backward()
    expected = {name: p.grad for name, p in frozen.named_parameters() if p.grad is not None}
    expected |= {f"discriminator.{name}": p.grad for name, p in adversary.named_parameters()}
    torch.testing.assert_close(ours, expected)
    assert all(gradient.abs().sum() > 0 for gradient in ours.values())


def test_gamma_does_not_reach_the_discriminator():
    x = images(10)
    weak, strong = (gradients(new_model("factor_vae", gamma=gamma), x) for gamma in (0.0, 50.0))
    for name in weak:
        assert torch.equal(weak[name], strong[name]) == (not name.startswith("encoder")), name


@pytest.mark.parametrize("name", ["annealed_vae", "beta_tcvae", "dip_vae_i", "dip_vae_ii"])
def test_gradients_against_finite_differences(name):
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = new_model(name, latents=2, width=3 / 256, shape=(1, 2, 2))

        def forward(self, x):
            return self.model.loss(x, generator=seeded(), step=3)["loss"]

    loss, x = Loss(), images(3, shape=(1, 2, 2))
    names, parameters = zip(*loss.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(
        lambda *given: torch.func.functional_call(loss, dict(zip(names, given, strict=True)), (x,)), parameters
    )


# --- planted ---------------------------------------------------------------------------------------------------------


def correlated(n, rho, generator):
    """n draws of two standard normals with correlation rho; their total correlation is -log(1 - rho^2) / 2."""
    a, b = torch.randn(2, n, generator=generator, dtype=torch.float64)
    return torch.stack([a, rho * a + math.sqrt(1 - rho**2) * b], 1)


class BestDiscriminator(Discriminator):
    """Logits whose difference is the exact log density ratio of `correlated` to its marginals."""

    def __init__(self, rho):
        super().__init__(2, 1)
        self.rho = rho

    def forward(self, z):
        a, b = z.unbind(1)
        square = (self.rho**2 * (a**2 + b**2) - 2 * self.rho * a * b) / (1 - self.rho**2)
        log_ratio = -(square + math.log(1 - self.rho**2)) / 2
        return torch.stack([log_ratio / 2, -log_ratio / 2], 1)


@pytest.mark.parametrize("rho", [0.0, 0.6, -0.9])
def test_the_best_discriminator_gives_the_total_correlation(rho):
    z = correlated(40_000, rho, seeded()).requires_grad_()
    judge = BestDiscriminator(rho)
    tc, cross_entropy = judge.judge(z, permute_dimensions(z.detach(), seeded(1)))
    with torch.no_grad():
        each = judge(z).diff(dim=1)
    error = 4 * float(each.std()) / math.sqrt(len(z)) + 1e-12
    assert abs(tc.item() + math.log(1 - rho**2) / 2) < error
    assert cross_entropy.item() <= math.log(2) + error
    tc.backward()
    a, b = z.detach().unbind(1)
    slope = -torch.stack([rho**2 * a - rho * b, rho**2 * b - rho * a], 1) / (1 - rho**2) / len(z)
    torch.testing.assert_close(z.grad, slope)


@pytest.mark.deep
def test_a_discriminator_learns_the_total_correlation():
    """Trained on its own loss, its estimate on fresh codes comes to what is planted, here .51 nats, and 0."""
    found = {}
    for rho in (0.0, 0.8):
        torch.manual_seed(0)
        judge = Discriminator(2, 64)
        optimizer = torch.optim.Adam(judge.parameters(), 1e-3, betas=(0.5, 0.9))
        generator = seeded()
        for _ in range(2000):
            z, other = (correlated(512, rho, generator).float() for _ in range(2))
            optimizer.zero_grad()
            judge.judge(z, permute_dimensions(other, generator))[1].backward()
            optimizer.step()
        with torch.no_grad():
            fresh, other = (correlated(50_000, rho, generator).float() for _ in range(2))
            found[rho] = judge.judge(fresh, permute_dimensions(other, generator))[0].item()
    assert abs(found[0.0]) < 0.05
    assert abs(found[0.8] - 0.511) < 0.1


def test_total_correlation_of_a_linear_gaussian_model():
    """mu = W x of standard normal x and constant sigma: q(z) is normal, and TC is known in closed form."""
    N, L = 1500, 2
    weight, sigma = [[1.0, 0.0], [0.7, 0.4]], [0.5, 0.6]
    model = new_model("beta_tcvae", latents=L, beta=2.0, weights="mss", likelihood="gaussian", dataset_size=N)
    model.encoder = LinearEncoder(weight, sigma)
    x = torch.randn(N, *SHAPE, generator=seeded(), dtype=torch.float64)
    with torch.no_grad():
        found = values(model.loss(x, generator=seeded(1)))["total_correlation"]
    covariance = np.array(weight) @ np.array(weight).T + np.diag(np.square(sigma))
    exact = (np.log(np.diag(covariance)).sum() - np.linalg.slogdet(covariance)[1]) / 2
    rho = covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1])
    # 4 standard errors of a mean of N log ratios (variance rho^2), and as much for the N means that make up q(z)
    assert abs(found - exact) < 8 * abs(rho) / math.sqrt(N)
    assert exact > 0.2


@pytest.mark.parametrize("name", ["dip_vae_i", "dip_vae_ii"])
def test_dip_penalty_of_a_linear_model(name):
    """Two independent binary pixels, every combination once: Cov(mu) = W W' / 4 exactly."""
    model = new_model(name, latents=2)
    model.encoder = LinearEncoder([[2.0, 0.0], [1.0, 3.0]], [0.5, 1.0])
    x = torch.zeros(4, *SHAPE, dtype=torch.float64)
    x.view(4, -1)[:, :2] = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    added = (0.25, 1.0) if name == "dip_vae_ii" else (0.0, 0.0)
    expected = 2.0 * 2 * 0.5**2 + 3.0 * ((1 + added[0] - 1) ** 2 + (2.5 + added[1] - 1) ** 2)
    assert values(model.loss(x))["covariance"] == pytest.approx(expected)


# --- where the objectives coincide -----------------------------------------------------------------------------------

SAME_AS_VAE = [
    ("beta_vae", {"beta": 1.0}),
    ("annealed_vae", {"gamma": 1.0, "capacity": 0.0}),
    ("factor_vae", {"gamma": 0.0}),
    ("beta_tcvae", {"beta": 1.0}),
    ("beta_tcvae", {"beta": 1.0, "weights": "mss"}),
    ("dip_vae_i", {"lambda_od": 0.0, "lambda_d": 0.0}),
    ("dip_vae_ii", {"lambda_od": 0, "lambda_d": 0}),
]


@pytest.mark.parametrize(("name", "options"), SAME_AS_VAE)
def test_without_its_own_term_each_is_the_vae(name, options):
    model, vae, x = new_model(name, **options), new_model("vae"), images(10)
    vae.encoder.load_state_dict(model.encoder.state_dict())
    vae.decoder.load_state_dict(model.decoder.state_dict())
    first = x[: len(x) // model.batches]
    terms = values(model.loss(x, generator=seeded()))
    terms.pop("discriminator", 0.0)
    assert sum(terms.values()) == pytest.approx(vae.loss(first, generator=seeded())["loss"].item(), rel=1e-12)
    expected, ours = gradients(vae, first), gradients(model, x)
    torch.testing.assert_close({name: ours[name] for name in expected}, expected)


def test_annealed_without_capacity_is_the_gamma_vae():
    annealed, beta = new_model("annealed_vae", gamma=7.0, capacity=0), new_model("beta_vae", beta=7.0)
    beta.load_state_dict(annealed.state_dict())
    for step in (0, 4, None):
        ours, theirs = annealed.loss(images(5), generator=seeded(), step=step), beta.loss(images(5), seeded())
        assert ours["loss"] == theirs["loss"] and ours["capacity"] == theirs["kl"]


def test_annealed_kl_is_pushed_from_both_sides():
    """Its gradient is that of KL times gamma above the capacity, and minus that below."""
    x = images(5)
    above, below = (gradients(new_model("annealed_vae", capacity=c), x) for c in (0.0, 1e6))
    model = new_model("annealed_vae")
    model.terms = lambda *arguments: (
        {"reconstruction": type(model).terms(model, *arguments)["reconstruction"]}
        | {"kl": torch.zeros((), dtype=torch.float64)}
    )
    neither = gradients(model, x)
    for name in ("encoder.mu.weight", "encoder.logvar.weight"):
        torch.testing.assert_close(above[name] - neither[name], neither[name] - below[name])


# --- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_terms_under_autocast(name):
    """All terms in float32 and near those without; every parameter still has its gradient, and nearly the same one."""
    model, x = new_model(name).float(), images(32).float()
    exact = model.loss(x, generator=seeded(), step=2)
    plain = gradients(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        terms = model.loss(x, generator=seeded(), step=2)
    assert all(term.dtype == torch.float32 for term in terms.values())
    for term, value in terms.items():
        assert value.item() == pytest.approx(exact[term].item(), rel=0.05, abs=0.05), term
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(x, generator=seeded())["loss"]
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        similarity = F.cosine_similarity(parameter.grad.flatten(), plain[parameter_name].flatten(), 0)
        assert similarity > 0.9, (parameter_name, float(similarity))


@pytest.mark.parametrize("name", ["dip_vae_i", "dip_vae_ii", "beta_tcvae"])
def test_autocast_does_not_round_what_follows_the_encoder(name):
    model = new_model(name).float()
    mu, logvar, z = torch.randn(3, 16, L, generator=seeded())
    x, logits = images(16).float(), torch.zeros(16, *SHAPE)
    exact = values(model.terms(x, logits, z, mu, logvar))
    with torch.autocast("cpu", torch.bfloat16):
        assert values(model.terms(x, logits, z, mu, logvar)) == exact
