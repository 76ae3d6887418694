"""Planted circuits: their closed forms against a plain loop of interventions, and the latent sweep against them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vaecirc_fast import groups as partitions
from vaecirc_fast import planted
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import latent_sweep

CIRCUITS = {circuit.name: circuit for circuit in planted.all()}
KINDS = ("l1", "mse", "rms", "tv", "signed")


@pytest.fixture(params=CIRCUITS, name="circuit")
def _circuit(request):
    return CIRCUITS[request.param]


def rounding(circuit, smallest_step=0.5):
    """What rounding may change: a few dozen ulps of the largest output, divided by the smallest step."""
    largest = float(circuit.decoder(circuit.z).detach().abs().max()) + 1
    return 64 * torch.finfo(circuit.z.dtype).eps * largest / smallest_step


# --- the closed forms, by definition ---------------------------------------------------------------------------------


def looped(circuit, steps, scale, effect):
    """Effects (latent, step, group) by the definition: one decoder call for each sample, latent and step."""
    seen = []
    handle = circuit.decoder.register_forward_hook(lambda module, args, out: seen.append(out.detach().flatten()))
    labels = circuit.groups.labels.tolist()
    members = [[p for p, label in enumerate(labels) if label == g] for g in range(len(circuit.groups))]
    result = np.zeros((circuit.z.shape[1], len(steps), len(members)))
    for code in circuit.z:
        circuit.decoder(code[None])
        base = seen.pop()
        for i in range(len(code)):
            for s, step in enumerate(steps):
                moved = code.clone()
                moved[i] += step * scale[i]
                circuit.decoder(moved[None])
                dy = (seen.pop() - base).tolist()
                for g, elements in enumerate(members):
                    result[i, s, g] += one_effect([dy[p] for p in elements], effect) / len(circuit.z)
    handle.remove()
    return result


def one_effect(dy, effect):
    n = len(dy)
    return {
        "l1": sum(abs(d) for d in dy) / n,
        "mse": sum(d * d for d in dy) / n,
        "rms": (sum(d * d for d in dy) / n) ** 0.5,
        "tv": sum(abs(d) for d in dy) / 2,
        "signed": sum(dy) / n,
    }[effect]


@pytest.mark.parametrize("effect", KINDS)
def test_effects_are_those_of_the_network(circuit, effect):
    steps = [-2.0, -0.5, 1.0, 3.0]
    truth = looped(circuit, steps, [1.0] * circuit.z.shape[1], effect)
    limit = rounding(circuit, 1) * (1 + np.abs(truth).max())
    assert np.abs(circuit.effects(np.array(steps), effect) - truth).max() < limit
    assert truth.any()


@pytest.mark.parametrize("grid", ["fixed", "posterior"])
def test_strength_and_specificity_are_those_of_the_network(circuit, grid):
    """CES = mean over samples, steps and outputs of effect / |step|; specificity = 1 - H(p_i) / log G."""
    steps = [0.6 * k for k in range(-5, 6) if k] if grid == "fixed" else [0.5 * k for k in range(-4, 5) if k]
    scale = [1.0] * circuit.z.shape[1] if grid == "fixed" else circuit.scale.tolist()
    effects = looped(circuit, steps, scale, circuit.effect)
    sizes = circuit.groups.sizes.tolist()
    ces, specificity = circuit.ces(grid), circuit.specificity(grid)
    for i in range(len(ces)):
        rows = [
            sum(effects[i, s, g] / abs(step) for s, step in enumerate(steps)) / len(steps) for g in range(len(sizes))
        ]
        by_size = [1] * len(sizes) if circuit.effect == "tv" else sizes
        expected = sum(row * size for row, size in zip(rows, by_size, strict=True)) / sum(by_size)
        assert ces[i] == pytest.approx(expected, abs=rounding(circuit))
        if expected > rounding(circuit):
            p = [row / sum(rows) for row in rows]
            entropy = -sum(q * np.log(q) for q in p if q > 0)
            assert specificity[i] == pytest.approx(1 - entropy / np.log(len(sizes)), abs=1e-10)
        else:
            assert ces[i] == 0 and np.isnan(specificity[i])


def test_what_the_circuits_show():
    ces = {name: circuit.ces() for name, circuit in CIRCUITS.items()}
    specificity = {name: circuit.specificity() for name, circuit in CIRCUITS.items()}
    assert specificity["linear_block"] == pytest.approx([1] * 4)
    assert specificity["linear_equal"] == pytest.approx([0] * 3, abs=1e-12)
    assert ces["linear_dead"][1] == 0 and np.isnan(specificity["linear_dead"][1])
    raw = CIRCUITS["linear_units"].ces("fixed")
    assert raw[0] == pytest.approx(8 * raw[1]) and ces["linear_units"][0] == pytest.approx(ces["linear_units"][1])
    assert specificity["conv_quadrants"][:4] == pytest.approx([1] * 4) and specificity["conv_quadrants"][4] < 0.5
    # the random decoder in one formula: the mean over outputs of |W_pi| s_i, for every step alike
    random = CIRCUITS["linear_random"]
    weight = random.decoder.weight.detach().abs().numpy()
    assert ces["linear_random"] == pytest.approx(weight.mean(0) * random.scale.numpy())
    # left of the kink only the first group moves, right of it only the second
    kink = CIRCUITS["relu_kink"]
    left, right = (kink.change(z[None], 0, np.array([[0.5, -0.5]])) for z in kink.z[[0, 2]].numpy())
    assert left[..., :2].all() and not left[..., 2:].any()
    assert right[..., 2:5].all() and not right[..., :2].any() and not right[..., 5:].any()


def test_codes_lie_on_both_sides_of_every_kink():
    kink, gate = CIRCUITS["relu_kink"].z[:, 0], CIRCUITS["relu_gate"].z
    assert (kink < 1).any() and (kink > 1).any() and (kink == 1).any()
    shut = (gate[:, 0] < -gate[:, 1] / 4) & (gate[:, 1] > 0)
    ajar = (gate[:, 0] < 0) & (gate[:, 0] > -gate[:, 1] / 4)
    assert shut.any() and ajar.any() and (gate[:, 0] > 0).any() and (gate[:, 1] < 0).any()


def test_the_truth_never_runs_the_network():
    for circuit in planted.all():
        handle = circuit.decoder.register_forward_pre_hook(lambda module, args: pytest.fail("ran the decoder"))
        circuit.effects("fixed"), circuit.ces(), circuit.specificity()
        handle.remove()


def test_float32_holds_every_circuit_exactly(circuit):
    half = circuit.to(torch.float32)
    for name, value in circuit.decoder.state_dict().items():
        assert torch.equal(half.decoder.state_dict()[name].double(), value)
    assert torch.equal(half.z.double(), circuit.z) and torch.equal(half.scale.double(), circuit.scale)
    assert half.z.dtype == torch.float32 and circuit.z.dtype == torch.float64
    assert np.array_equal(half.effects(), circuit.effects())


def test_names_differ_and_every_circuit_says_what_it_shows():
    assert len(CIRCUITS) == len(planted.all()) >= 9
    assert all(circuit.shows.endswith(".") and len(circuit.shows) > 30 for circuit in CIRCUITS.values())


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda c: c.effects("resample"), "grid"),
        (lambda c: c.effects(np.zeros((2, 2, 2, 2))), "grid"),
        (lambda c: c.effects(np.array([0.0, 1.0])), "zero"),
        (lambda c: c.effects("fixed", "l2"), "effect"),
        (lambda c: c.ces("fixed", "mse"), "effect"),
        (lambda c: planted.score(lambda p: np.zeros(3)), "linear_block"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(InputError, match=match):
        call(CIRCUITS["linear_block"])


# --- the sweep against the truth -------------------------------------------------------------------------------------


def swept(circuit, **options):
    options = dict(effect=circuit.effect, groups=circuit.groups) | options
    if options["grid"] == "posterior":
        options["scale"] = circuit.scale
    return latent_sweep(circuit.decoder, circuit.z, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("grid", ["fixed", "posterior"])
@pytest.mark.parametrize("effect", KINDS)
def test_the_sweep_recovers_every_circuit(circuit, effect, grid, dtype):
    circuit = circuit.to(dtype)
    truth = circuit.effects(grid, effect)
    limit = rounding(circuit) * (1 + np.abs(truth).max())
    E = swept(circuit, grid=grid, effect=effect)
    assert np.abs(E.tensor.double().numpy() - truth).max() < limit
    if effect in ("l1", "rms", "tv"):
        assert np.abs(E.ces()["ces"].to_numpy() - circuit.ces(grid, effect)).max() < limit


def test_the_sweep_recovers_specificity(circuit):
    table = swept(circuit, grid="posterior").specificity()
    truth = circuit.specificity()
    assert np.array_equal(np.isnan(table["specificity"]), np.isnan(truth))
    assert table["specificity"].to_numpy() == pytest.approx(truth, abs=1e-10, nan_ok=True)


def test_the_sweep_recovers_resampling(circuit):
    """The shifts that resampling made are read off an identity decoder; the truth then follows from the closed form."""
    latents = circuit.z.shape[1]
    moved = latent_sweep(
        nn.Identity(),
        circuit.z,
        grid="resample",
        effect="signed",
        groups=partitions.spans([1] * latents),
        reduce=None,
        seed=5,
    ).tensor
    shifts = torch.diagonal(moved, dim1=1, dim2=3).permute(0, 2, 1)  # (sample, latent, step)
    assert shifts.abs().sum() > 0
    E = swept(circuit, grid="resample", seed=5)
    assert np.abs(E.ces()["ces"].to_numpy() - circuit.ces(shifts)).max() < rounding(circuit)


def test_score_is_zero_for_the_sweep_and_not_for_mistakes():
    def right(p):
        return swept(p, grid="posterior").step_normalised()

    assert (planted.score(right)["max_error"] < 1e-12).all()
    nothing = planted.score(lambda p: np.zeros((p.z.shape[1], len(p.groups))))
    assert (nothing["max_error"] == nothing["largest"]).all() and (nothing["largest"] > 0.1).all()
    assert np.isinf(planted.score(lambda p: right(p) * float("nan"))["max_error"]).all()
    # raw steps, a neighbour's row, one sample in place of all: each mistake shows somewhere
    mistakes = {
        "scale": lambda p: latent_sweep(
            p.decoder, p.z, grid="fixed", effect=p.effect, groups=p.groups
        ).step_normalised(),
        "row": lambda p: right(p).roll(1, 0),
        "group": lambda p: right(p).roll(1, 1),
        "sample": lambda p: latent_sweep(
            p.decoder, p.z[:2], grid="posterior", scale=p.scale, effect=p.effect, groups=p.groups
        ).step_normalised(),
    }
    for name, method in mistakes.items():
        assert planted.score(method)["max_error"].max() > 1e-3, name


# --- invariances of the definitions, on decoders that are not planted ------------------------------------------------

L, P = 4, 6


class Reparametrised(nn.Module):
    """A decoder that first maps its codes back."""

    def __init__(self, decoder, back):
        super().__init__()
        self.decoder, self.back = decoder, back

    def forward(self, z):
        return self.decoder(self.back(z))


def random_decoder(seed):
    generator = torch.Generator().manual_seed(seed)
    decoder = nn.Sequential(nn.Linear(L, 8), nn.Tanh(), nn.Linear(8, P)).double()
    with torch.no_grad():
        for p in decoder.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return decoder, torch.randn(10, L, generator=generator, dtype=torch.float64)


def ces_of(decoder, z, **options):
    return latent_sweep(decoder, z, groups=partitions.spans([1, 2, 3]), **options).ces()["ces"].to_numpy()


units = st.lists(st.floats(0.01, 100).flatmap(lambda a: st.sampled_from([a, -a])), min_size=L, max_size=L)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), unit=units)
def test_posterior_ces_does_not_depend_on_the_unit_of_a_latent(seed, unit):
    decoder, z = random_decoder(seed)
    a = torch.tensor(unit, dtype=torch.float64)
    scale = z.std(0)
    expected = ces_of(decoder, z, grid="posterior", scale=scale)
    scaled = ces_of(Reparametrised(decoder, lambda w: w / a), z * a, grid="posterior", scale=scale * a.abs())
    assert scaled == pytest.approx(expected, rel=1e-10)


MAPS = {
    "cubic": (lambda z: z**3, lambda w: w.sign() * w.abs() ** (1 / 3)),
    "sinh": (torch.sinh, torch.asinh),
    "affine": (lambda z: 5 - 3 * z, lambda w: (5 - w) / 3),
    "exponential": (torch.exp, torch.log),
}


@pytest.mark.parametrize("name", MAPS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), effect=st.sampled_from(["l1", "rms"]))
def test_resample_ces_does_not_depend_on_any_invertible_map(name, seed, effect):
    forth, back = MAPS[name]
    decoder, z = random_decoder(seed)
    expected = ces_of(decoder, z, grid="resample", effect=effect, seed=seed)
    mapped = ces_of(Reparametrised(decoder, back), forth(z), grid="resample", effect=effect, seed=seed)
    assert mapped == pytest.approx(expected, rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    order=st.permutations(range(L)),
    grid=st.sampled_from(["fixed", "posterior", "resample"]),
)
def test_permuting_latents_permutes_rows(seed, order, grid):
    decoder, z = random_decoder(seed)
    scale, order = z.std(0), list(order)
    inverse = torch.argsort(torch.tensor(order))
    permuted = Reparametrised(decoder, lambda w: w[:, inverse])
    expected = ces_of(decoder, z, grid=grid, scale=scale)
    assert ces_of(permuted, z[:, order], grid=grid, scale=scale[order]) == pytest.approx(expected[order], rel=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    labels=st.permutations([0, 0, 0, 1, 1, 2]),
    names=st.permutations(range(3)),
    effect=st.sampled_from(["l1", "rms", "tv"]),
)
def test_permuting_groups_keeps_ces_and_specificity(seed, labels, names, effect):
    decoder, z = random_decoder(seed)
    renamed = [names[label] for label in labels]
    before, after = (
        latent_sweep(decoder, z, grid="fixed", effect=effect, groups=partitions.from_labels(torch.tensor(labels_)))
        for labels_ in (labels, renamed)
    )
    assert after.tensor[..., list(names)].numpy() == pytest.approx(before.tensor.numpy(), rel=1e-12)
    assert after.ces()["ces"].to_numpy() == pytest.approx(before.ces()["ces"].to_numpy(), rel=1e-12)
    expected = before.specificity()["specificity"].to_numpy()
    assert after.specificity()["specificity"].to_numpy() == pytest.approx(expected, abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), labels=st.permutations([0, 0, 0, 1, 1, 2]))
def test_the_mean_change_does_not_depend_on_the_partition(seed, labels):
    """With l1, groups weighted by their size: the CES of any partition is that of the whole output."""
    decoder, z = random_decoder(seed)
    parts = latent_sweep(decoder, z, grid="fixed", groups=partitions.from_labels(torch.tensor(labels)))
    whole = latent_sweep(decoder, z, grid="fixed")
    assert parts.ces()["ces"].to_numpy() == pytest.approx(whole.ces()["ces"].to_numpy(), rel=1e-12)
