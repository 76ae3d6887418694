"""The engines of a latent sweep: whatever the planner takes, the effects are those of the decoder called as it is."""

import copy
from dataclasses import replace

import pytest
import torch
from backends import ALL, parameters
from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from interventions.live_memory import LiveMemory
from strategies import any_partition, decoder_module
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast import groups as partitions
from vaecirc_fast import models, planted
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import fused
from vaecirc_fast.interventions import latent_sweep as sweep
from vaecirc_fast.interventions.networks import record

CIRCUITS = {circuit.name: circuit for circuit in planted.all()}
GRIDS = ("fixed", "posterior", "resample", "traverse")


def engines_for(decoder, z, groups, effect):
    """Those that apply, by the planner's own words."""
    network = record(decoder, z[:1]).network
    if network is None:  # a product of latents is no layer
        return ["generic", "auto"]
    names = ["generic", "fused", "auto"]
    head = fused.gram_head(network, groups, effect)
    return names if isinstance(head, str) else [*names, "gram"]


# --- planted circuits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("effect", ["l1", "mse", "rms", "tv", "signed"])
@pytest.mark.parametrize("name", CIRCUITS)
def test_planted_circuits_on_every_engine(name, effect, dtype):
    """Effects in closed form, written out in numpy from the planted weights."""
    circuit = CIRCUITS[name]
    at = circuit.to(dtype)
    for grid in ("fixed", "posterior"):
        truth = torch.from_numpy(circuit.effects(grid, effect))
        options = {"grid": grid, "scale": at.scale, "effect": effect, "groups": at.groups}
        largest = float(circuit.decoder(circuit.z).detach().abs().max()) + 1 + float(truth.abs().max())
        unit = torch.full_like(truth, 4 * largest * (largest if effect == "mse" else 1))
        for engine in engines_for(at.decoder, at.z, at.groups, effect):
            E = sweep(at.decoder, at.z, engine=engine, **options)
            assert E.plan.startswith(engine) or engine == "auto"
            if effect == "rms" and dtype == torch.float32:  # the root of a rounding error is no rounding error
                E_squared = sweep(at.decoder, at.z, engine=engine, **{**options, "effect": "mse"}, reduce=None)
                assert torch.allclose(E_squared.tensor.sqrt().mean(0), E.tensor, rtol=1e-5, atol=1e-6)
                continue
            assert_close(E.tensor, truth.to(dtype), truth, terms=4096, unit=unit)


@pytest.mark.parametrize("backend", parameters([b for b in ALL if b.device == "cpu" and b.name != "cuda"]))
@pytest.mark.parametrize("name", CIRCUITS)
def test_planted_circuits_on_every_backend(name, backend):
    """In float32, on few samples and steps: the interpreter is slow."""
    circuit = replace(CIRCUITS[name], z=CIRCUITS[name].z[:2])
    at, steps = circuit.to(torch.float32), torch.tensor([-1.0, 2.0])
    if record(at.decoder, at.z[:1]).network is None:
        pytest.skip("its layers are not such as kernels know")
    truth = torch.from_numpy(circuit.effects(steps.double()))
    largest = float(circuit.decoder(circuit.z).detach().abs().max()) + 1 + float(truth.abs().max())
    with backend.forced():
        E = sweep(at.decoder, at.z, grid=steps, effect=at.effect, groups=at.groups, engine="fused")
    assert f"fused engine ({backend.name}" in E.plan
    assert_close(E.tensor, truth.float(), truth, terms=256, unit=torch.full_like(truth, 4 * largest))


def test_gram_is_among_them():
    """The planted circuits have groups no larger than their layers are wide; this one has."""
    weight = torch.tensor([[1.0, 0, 2], [0, -1, 1], [2, 2, 0], [1, 1, 1], [0, 3, 0]])
    decoder = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 5))
    with torch.no_grad():
        decoder[0].weight.copy_(torch.tensor([[1.0, 0], [0, 2], [1, -1]]))
        decoder[0].bias.copy_(torch.tensor([4.0, 4, 4]))
        decoder[2].weight.copy_(weight)
    z = torch.tensor([[0.0, 0.5], [0.5, 0.0]])
    shifts = torch.tensor([-0.5, 1.0])
    E = sweep(decoder, z, grid=shifts, effect="mse", engine="gram")
    columns = weight @ decoder[0].weight.detach()  # all units stay active: linear
    expected = (columns.T[:, None] * shifts[:, None]).square().mean(-1)
    assert torch.allclose(E.tensor[..., 0], expected, rtol=1e-5) and "gram engine" in E.plan


# --- any decoder -----------------------------------------------------------------------------------------------------


def effects_of(decoder, z, **options):
    return sweep(decoder, z, reduce=None, replicates=0, **options).tensor


def magnitudes(decoder, z, **options):
    """How large the numbers were that cancel in an effect: of |y| + |y0| in place of |y - y0|, in float64."""
    effect = options.pop("effect")
    squared = effect in ("mse", "logit_mse")

    def both(codes):
        y = decoder(codes).flatten(1)
        return y.abs()

    largest = max(float(both(z).max()), 1.0)
    deltas = effects_of(decoder, z, effect="l1" if effect != "tv" else "tv", **options)
    sizes = options["groups"].sizes.double() / 2 if effect == "tv" else torch.ones(len(options["groups"]))
    scale = 2 * largest * sizes + deltas + float(deltas.max())
    return scale.square() if squared else scale


@pytest.mark.parametrize("convolutions", [False, True], ids=["mlp", "conv"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_engine_equals_the_generic_one(convolutions, data):
    """Over depths, widths, activations, strides, kernels, channels, links, grids, effects and partitions."""
    check_engines(convolutions, data)


@pytest.mark.deep
@pytest.mark.parametrize("convolutions", [False, True], ids=["mlp", "conv"])
@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_every_engine_equals_the_generic_one_often(convolutions, data):
    check_engines(convolutions, data)


def check_engines(convolutions, data):
    double, latents = data.draw(decoder_module(convolutions))
    samples = data.draw(st.integers(2, 4))
    z64 = torch.randn(samples, latents, generator=torch.Generator().manual_seed(7)).double()
    z64 = z64.float().double()
    with torch.no_grad():
        elements = double(z64[:1]).numel()
    groups = data.draw(any_partition(elements)) if elements <= 70 else partitions.whole(elements)
    effect = data.draw(st.sampled_from(["l1", "mse", "rms", "tv", "signed"]))
    scale = torch.rand(latents, generator=torch.Generator().manual_seed(8)) + 0.25
    grid = data.draw(st.sampled_from(GRIDS))
    options = {"grid": grid, "effect": effect, "groups": groups}
    single = copy.deepcopy(double).float()
    for p, q in zip(double.parameters(), single.parameters(), strict=True):
        p.data = q.data.double()  # the same numbers
    z = z64.float()
    truth = effects_of(double, z64, engine="generic", scale=scale.double(), **options)
    unit = magnitudes(double, z64, scale=scale.double(), **options)
    plain = effects_of(single, z, engine="generic", scale=scale, **options)
    terms = elements + max(p.numel() for p in double.parameters())
    for engine in engines_for(single, z, groups, effect):
        found = effects_of(single, z, engine=engine, scale=scale, **options)
        if effect == "rms":  # a root magnifies what is near zero: compared as squares
            assert_close(found.square(), plain.square(), truth.square(), terms=terms, unit=unit.square())
        else:
            assert_close(found, plain, truth, terms=terms, unit=unit)
        in_double = effects_of(double, z64, engine=engine, scale=scale.double(), **options)
        assert_close(in_double.square(), truth.square(), truth.square(), terms=terms, unit=unit.square())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("effect", ["l1", "logit_mse"])
@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_image_decoders(net, effect, grid):
    """Cells, bootstrap replicates, all grids."""
    torch.manual_seed(0)
    decoder = models.build("vae", (1, 16, 16), 3, net=net, width=0.25).decoder.eval()
    z, scale = torch.randn(11, 3), torch.tensor([0.5, 1.0, 2.0])
    options = {"grid": grid, "scale": scale, "effect": effect, "groups": partitions.cells(16, 16, 8), "replicates": 50}
    generic = sweep(decoder, z, engine="generic", **options)
    for engine in engines_for(decoder.logits if effect == "logit_mse" else decoder, z, options["groups"], effect):
        E = sweep(decoder, z, engine=engine, **options)
        assert (E.dims, E.coords, E.samples) == (generic.dims, generic.coords, generic.samples)
        assert torch.allclose(E.tensor, generic.tensor, rtol=1e-4, atol=1e-7)
        assert torch.allclose(E.replicates, generic.replicates, rtol=1e-4, atol=1e-7)
        again = sweep(decoder, z, engine=engine, **options)
        assert torch.equal(E.tensor, again.tensor) and torch.equal(E.replicates, again.replicates)


# --- the planner -----------------------------------------------------------------------------------------------------


def mlp(latents=3, elements=300, hidden=8):
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(latents, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, elements)
    )


def test_the_plan_says_which_engine_and_why():
    decoder, z = mlp(), torch.randn(20, 3)
    assert sweep(decoder, z).plan.startswith("fused engine (cpp")
    plan = sweep(decoder, z, effect="rms").plan
    assert plan.startswith("gram engine") and "8 rows for 300" in plan
    assert "layers" not in sweep(decoder, z, engine="generic").plan
    assert "(asked for)" in sweep(decoder, z, engine="generic").plan
    assert "no kernel for torch.float64 on cpu" in sweep(decoder.double(), z.double()).plan
    assert "is no layer that the kernels know" in sweep(lambda z: torch.sin(z), z).plan
    with vf.backend("reference"):
        assert sweep(mlp(), z).plan.startswith("generic engine")
        assert sweep(mlp(), z, engine="fused").plan.startswith("fused engine (reference)")


def test_few_decodes_do_not_pay_for_a_factor():
    decoder, z = mlp(hidden=64, elements=100), torch.randn(1, 3)
    assert sweep(decoder, z, grid=torch.tensor([1.0]), effect="mse").plan.startswith("fused engine")
    assert sweep(decoder, z, grid=torch.tensor([1.0]), effect="mse", engine="gram").plan.startswith("gram engine")


@pytest.mark.parametrize(
    ("decoder", "options", "message"),
    [
        (mlp(), {"engine": "quick"}, "engine: 'quick' is unknown; known: auto, fused, gram, generic"),
        (mlp(), {"precision": "fp8"}, "precision: 'fp8' is unknown; known: float32, tf32, bf16"),
        (torch.sin, {"engine": "fused"}, "engine: 'fused' cannot be had: .*sin.default is no layer"),
        (torch.sin, {"precision": "bf16"}, "precision: 'bf16' cannot be had: .*sin.default is no layer"),
        (mlp(), {"engine": "gram"}, "engine: 'gram' cannot be had: l1 is not a squared effect"),
        (nn.Sequential(mlp(), nn.Sigmoid()), {"engine": "gram", "effect": "mse"}, "mse is taken after the sigmoid"),
        (mlp(hidden=400), {"engine": "gram", "effect": "mse"}, "no group has more elements than .* 400 inputs"),
        (nn.Linear(3, 9), {"engine": "gram", "effect": "mse"}, "there is one layer"),
        (
            mlp(),
            {"engine": "generic", "precision": "bf16"},
            "precision: 'bf16' is of the fused engine, not of 'generic'",
        ),
    ],
)
def test_an_engine_that_cannot_be_had_is_refused(decoder, options, message):
    with pytest.raises(InputError, match=message):
        sweep(decoder, torch.randn(4, 3), **options)


def test_lower_precision_states_its_error():
    decoder, z = mlp(), torch.randn(8, 3)
    exact = sweep(decoder, z)
    for precision, most in (("tf32", 2**-8), ("bf16", 2**-5)):
        E = sweep(decoder, z, precision=precision)
        assert f"{precision} effects differ from float32 by" in E.plan
        stated = float(E.plan.split("differ from float32 by ")[1].split()[0])
        assert 0 < stated < most
        assert (E.tensor - exact.tensor).norm() / exact.tensor.norm() < 4 * stated


def test_the_factor_follows_the_weights():
    """Changed in a way that leaves no trace in version counters."""
    decoder, z = mlp(), torch.randn(20, 3)
    before = sweep(decoder, z, effect="mse", engine="gram").tensor
    decoder[4].weight.data.mul_(2)
    after = sweep(decoder, z, effect="mse", engine="gram").tensor
    assert torch.allclose(after, 4 * before, rtol=1e-5)


def test_latents_that_nothing_reads_are_not_decoded():
    decoder, z = mlp(), torch.randn(5, 3)
    with torch.no_grad():
        decoder[0].weight[:, 1] = 0
    E = sweep(decoder, z, engine="fused")
    assert not E.tensor[1].any() and E.tensor[[0, 2]].all() and "nor 10 steps of latents that nothing reads" in E.plan
    assert f"{5 * 21} decodes" in E.plan
    with torch.no_grad():
        decoder[0].weight.zero_()
    assert not sweep(decoder, z, engine="fused").tensor.any()


def test_a_decoder_that_the_network_does_not_reproduce_is_called_itself():
    """One whose operations depend on the number of rows: the look at one row misleads."""

    def decoder(z):
        y = z @ torch.ones(3, 4)
        return y if len(z) == 1 else 2 * y

    E = sweep(decoder, torch.randn(6, 3))
    assert "do not make its output" in E.plan
    assert torch.allclose(E.tensor[..., 0], 2 * E.step_size, rtol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("engine", ["fused", "generic", "auto"])
def test_weights_that_are_not_finite(value, engine):
    decoder = mlp()
    with torch.no_grad():
        decoder[2].weight[3, 4] = value
    with pytest.raises(InputError, match="decoder: its output is NaN or infinite for latent 0 at step 0"):
        sweep(decoder, torch.randn(4, 3), engine=engine)


def test_compiled_decoders_and_bound_methods():
    z = torch.randn(4, 3)
    model = models.build("vae", (1, 8, 8), 3, net="mlp", width=0.25).eval()
    expected = sweep(model.decoder, z)
    assert expected.plan.startswith("fused")
    for decoder in (model.decode, torch.compile(model.decoder, backend="eager")):
        E = sweep(decoder, z)
        assert E.plan.startswith("fused") and torch.equal(E.tensor, expected.tensor)


def test_memory_does_not_grow_with_samples_or_steps():
    decoder = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2048), nn.Sigmoid())

    def peak(samples, steps):
        z = torch.randn(samples, 3)
        with LiveMemory() as memory:
            sweep(decoder, z, grid=torch.linspace(1, 2, steps), replicates=0, engine="fused")
        return memory.peak

    small, outputs = peak(50, 4), 4 * 2048  # bytes of one output
    assert peak(2000, 4) < small + 200 * outputs  # all would be 26,000 of them
    assert peak(50, 160) < small + 200 * outputs
