"""The op direct_edges on every backend: values, the definition by loops, scales, transforms, threads and bad input."""

import math

import pytest
import torch
from backends import CPP, one_of_each, parameters
from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

import vaecirc_fast as vf
from vaecirc_fast import _registry
from vaecirc_fast.errors import BackendError, InputError
from vaecirc_fast.ops.direct_edges import in_sd
from vaecirc_fast.reference import direct_edges as reference
from vaecirc_fast.reference.latent_sweep import ACTIVATIONS, activate

KINDS = reference.KINDS
ROW = _registry.rows["direct_edges"]
OP = torch.ops.vaecirc_fast.direct_edges.default


def problem(pairs=5, parents=7, children=6, seed=0, dtype=torch.float32):
    """Base and source activations, weight and pre-activations, of usual sizes."""
    g = torch.Generator().manual_seed(seed)
    base, source = torch.randn(pairs, parents, generator=g).relu(), torch.randn(pairs, parents, generator=g).relu()
    weight = torch.randn(children, parents, generator=g)
    pre = torch.randn(pairs, children, generator=g) * 2
    return [t.to(dtype) for t in (base, source, weight, pre)]


def unit_of(tensors, kind, slope, truth):
    """What one rounding of every activation, and of what goes into it, changes in a result."""
    base, source, weight, pre = (t.double() for t in tensors)
    change, eps = source - base, torch.finfo(tensors[0].dtype).eps
    # No activation is steeper than 1.1 or its slope; silu and elu are as large as their argument.
    size = (1.1 + abs(slope)) * 2 * (pre.abs()[:, :, None] + (weight * change[:, None]).abs()) + abs(slope) + 1
    if KINDS[kind] == "mse":
        moved = (weight * change[:, None]).abs() * (1.1 + abs(slope))
        size = 2 * moved * size + eps * size.square()
    if KINDS[kind] == "rms":
        size = size.square()
    unit = size.mean(0)
    return torch.maximum(unit.sqrt() if KINDS[kind] == "rms" else unit, truth.abs())


def check(tensors, backend, activation, kind, slope=None):
    """The op against the reference by the rule of close.py."""
    on_device = [t.to(backend.device) for t in tensors]
    out = vf.ops.direct_edges(*on_device, activation, kind, slope=slope).cpu()
    number = {"leaky_relu": 0.01, "elu": 1.0}.get(activation, 0.0) if slope is None else slope
    rest = (ACTIVATIONS.index(activation), number, KINDS.index(kind))
    truth = reference.forward(*(t.double() for t in tensors), *rest)
    yardstick = reference.forward(*tensors, *rest)
    unit = unit_of(tensors, rest[2], number, truth)
    assert_close(out, yardstick, truth, terms=len(tensors[0]), unit=unit)


SIZES = [(1, 1, 1), (3, 15, 2), (5, 16, 3), (4, 65, 66), (70, 37, 5), (129, 3, 64)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values(backend, sizes):
    if backend.interpreted:
        sizes = (min(sizes[0], 9), *sizes[1:])
    for activation in ACTIVATIONS:
        for kind in KINDS[:: 3 if backend.interpreted else 1]:
            check(problem(*sizes), backend, activation, kind)


@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 20), st.sampled_from(ACTIVATIONS), st.integers(0, 99))
def test_any_problem(backend, pairs, parents, children, activation, seed):
    slope = {"leaky_relu": 0.3, "elu": 0.7}.get(activation)
    check(problem(pairs, parents, children, seed), backend, activation, KINDS[seed % 4], slope)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64(backend, activation):
    tensors = problem(dtype=torch.float64)
    if ROW.why_not(backend.name, backend.device, torch.float64):
        with pytest.raises(BackendError, match="has no kernel for torch.float64"):
            vf.ops.direct_edges(*tensors, activation)
        return
    check(tensors, backend, activation, "l1")


def test_large_and_tiny_changes_of_a_relu(backend):
    """A child far from its threshold moves by weight times change, to the last bit but one: nothing cancels."""
    base, source = torch.zeros(1, 3), torch.tensor([[1e-6, -1e-6, 3e-5]])
    weight, pre = torch.ones(1, 3), torch.full((1, 1), 1e6)
    out = vf.ops.direct_edges(*(t.to(backend.device) for t in (base, source, weight, pre)), "relu").cpu()
    if backend.name != "reference":
        assert torch.equal(out, source.abs())
    assert vf.ops.direct_edges(*(t.to(backend.device) for t in (base, source, weight, -pre)), "relu").sum() == 0


# --- the definition, apart from the reference ------------------------------------------------------------------------

SCALARS = {
    "identity": lambda x, slope: x,
    "relu": lambda x, slope: max(x, 0.0),
    "leaky_relu": lambda x, slope: x if x > 0 else slope * x,
    "elu": lambda x, slope: x if x > 0 else slope * math.expm1(x),
    "sigmoid": lambda x, slope: 1 / (1 + math.exp(-x)),
    "tanh": lambda x, slope: math.tanh(x),
    "silu": lambda x, slope: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_definition(activation):
    base, source, weight, pre = problem(3, 4, 2, dtype=torch.float64)
    slope = {"leaky_relu": 0.2, "elu": 1.5}.get(activation)
    f = SCALARS[activation]
    defined = {kind: torch.empty(2, 4, dtype=torch.float64) for kind in KINDS}
    for v in range(2):
        for u in range(4):
            d = []
            for b in range(3):
                c, shift = float(pre[b, v]), float(weight[v, u]) * (float(source[b, u]) - float(base[b, u]))
                d.append(f(c + shift, slope) - f(c, slope))
            squares = math.fsum(x * x for x in d) / 3
            of = {"l1": math.fsum(map(abs, d)) / 3, "mse": squares, "rms": math.sqrt(squares), "signed": sum(d) / 3}
            for kind in KINDS:
                defined[kind][v, u] = of[kind]
    for kind in KINDS:
        out = vf.ops.direct_edges(base, source, weight, pre, activation, kind, slope=slope)
        unit = unit_of((base, source, weight, pre), KINDS.index(kind), slope or 0.0, defined[kind])
        assert_close(out, defined[kind], defined[kind], terms=3, unit=unit)


def test_in_child_sd_per_parent_sd():
    base, source, weight, pre = problem(dtype=torch.float64)
    parent_sd, child_sd = torch.rand(7, dtype=torch.float64) + 1, torch.rand(6, dtype=torch.float64) + 1
    change = source - base
    strength = {"l1": change.abs().mean(0), "mse": change.square().mean(0), "signed": change.abs().mean(0)}
    strength["rms"] = strength["mse"].sqrt()
    for kind in KINDS:
        raw = vf.ops.direct_edges(base, source, weight, pre, "relu", kind)
        power = 2 if kind == "mse" else 1
        expected = raw / child_sd[:, None] ** power / (strength[kind] / parent_sd**power)
        out = vf.ops.direct_edges(base, source, weight, pre, "relu", kind, parent_sd=parent_sd, child_sd=child_sd)
        assert_close(out, expected, expected, terms=4)


def test_units_that_cannot_be_measured():
    edges, change = torch.ones(3, 2), torch.tensor([0.0, 1.0])
    out = in_sd(edges, change, torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0, 2.0]))
    assert out[0].isnan().all() and out[1:].tolist() == [[0, 2], [0, 1]]
    assert in_sd(edges, change, torch.tensor([1.0, 0.0]), torch.ones(3))[:, 1].isnan().all()


# --- other ways to call it -------------------------------------------------------------------------------------------


@one_of_each
def test_memory_layout_changes_nothing(backend):
    tensors = [t.to(backend.device) for t in problem()]
    expected = vf.ops.direct_edges(*tensors, "relu", "rms")
    for n in range(4):
        for laid_out in (tensors[n].T.contiguous().T, tensors[n].repeat_interleave(2, 1)[:, ::2]):
            out = vf.ops.direct_edges(*(laid_out if k == n else t for k, t in enumerate(tensors)), "relu", "rms")
            if backend.name == "reference":  # torch adds in the order of memory
                assert_close(out.cpu(), expected.cpu(), expected.double().cpu(), terms=5)
            else:
                assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", parameters(CPP), indirect=True)
def test_threads_change_nothing(backend):
    tensors, found = problem(65, 130, 140), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(vf.ops.direct_edges(*tensors, "tanh"))
    assert torch.equal(*found)


def test_no_units(backend):
    for parents, children in ((0, 3), (3, 0), (0, 0)):
        tensors = [t.to(backend.device) for t in problem(2, parents, children)]
        assert vf.ops.direct_edges(*tensors, "relu").shape == (children, parents)
        assert vf.ops.direct_edges(*tensors).shape == (children, parents)


@pytest.mark.parametrize("what", range(4), ids=["base", "source", "weight", "pre"])
def test_nan_spoils_what_it_enters_and_nothing_else(backend, what):
    tensors = problem()
    tensors[what][1, 2] = math.nan
    spoilt = torch.zeros(6, 7, dtype=torch.bool)
    if what < 2:
        spoilt[:, 2] = True
    elif what == 2:
        spoilt[1, 2] = True
    else:
        spoilt[2] = True
    for activation in ACTIVATIONS:
        out = vf.ops.direct_edges(*(t.to(backend.device) for t in tensors), activation).cpu()
        assert torch.equal(out.isnan(), spoilt), activation


def test_infinite_pre_activations(backend):
    """A ReLU at minus infinity stays shut; at infinity no difference is left."""
    tensors = problem()
    tensors[3][1, 2], tensors[3][0, 3] = math.inf, -math.inf
    out = vf.ops.direct_edges(*(t.to(backend.device) for t in tensors), "relu").cpu()
    assert out[2].isnan().all() and out[3].isfinite().all()


@one_of_each
def test_opcheck(backend):
    for n, activation in enumerate((0, 1, 5)):
        tensors = [t.to(backend.device).requires_grad_(n == 1) for t in problem()]
        with torch.no_grad() if n == 1 else torch.enable_grad():
            torch.library.opcheck(OP, (*tensors, activation, 0.0, n))


@one_of_each
def test_compiled(backend):
    tensors = [t.to(backend.device) for t in problem()]
    compiled = torch.compile(lambda *t: vf.ops.direct_edges(*t, "relu") * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), vf.ops.direct_edges(*tensors, "relu") * 2)


@one_of_each
def test_vmap(backend):
    base, source, weight, pre = (t.to(backend.device) for t in problem())
    sources = torch.stack([source, base, source + 1])
    out = torch.vmap(lambda s: vf.ops.direct_edges(base, s, weight, pre, "relu"))(sources)
    assert torch.equal(out, torch.stack([vf.ops.direct_edges(base, s, weight, pre, "relu") for s in sources]))
    weights = torch.stack([weight, weight * 2], 2)
    out = torch.vmap(lambda w: vf.ops.direct_edges(base, source, w, pre, "relu"), in_dims=2)(weights)
    assert torch.equal(out[1], vf.ops.direct_edges(base, source, weight * 2, pre, "relu"))


def test_a_backward_pass_names_the_way_out():
    base, source, weight, pre = problem()
    weight.requires_grad_()
    out = vf.ops.direct_edges(base, source, weight, pre, "relu")
    with pytest.raises(
        NotImplementedError, match="direct_edges has no gradient.*no_grad.*reference.direct_edges.forward"
    ):
        out.sum().backward()
    reference.forward(base, source, weight, pre, 1, 0.0, 0).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_the_reference_is_tiled(monkeypatch):
    tensors = problem()
    expected = reference.forward(*tensors, 1, 0.0, 0)
    sizes = []
    monkeypatch.setattr(reference, "TILE_BYTES", 1)
    monkeypatch.setattr(reference, "activate", lambda x, *rest: sizes.append(x.numel()) or activate(x, *rest))
    out = reference.forward(*tensors, 1, 0.0, 0)
    assert_close(out, expected, expected.double(), terms=5)
    assert max(sizes) == 5 * 7  # one child at a time


BAD = {
    "base: expected a tensor of two dimensions": lambda b, s, w, p: (b[0], s, w, p),
    "weight: expected a tensor of two dimensions, got list": lambda b, s, w, p: (b, s, [1], p),
    "base: expected at least one pair": lambda b, s, w, p: (b[:0], s[:0], w, p[:0]),
    r"source: expected shape \(5, 7\)": lambda b, s, w, p: (b, s[:, :3], w, p),
    r"weight: expected shape \(7, 7\)|weight: expected shape \(6, 7\)": lambda b, s, w, p: (b, s, w[:, :5], p),
    r"pre: expected shape \(5, 6\)": lambda b, s, w, p: (b, s, w, p.T),
    "expected one dtype, float32 or float64, got base torch.float64": lambda b, s, w, p: (b.double(), s, w, p),
    "got base torch.bfloat16": lambda b, s, w, p: [t.bfloat16() for t in (b, s, w, p)],
    "expected one device": lambda b, s, w, p: (b, s, w, p.to("meta")),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_tensors_are_named(message):
    with pytest.raises(InputError, match=message):
        vf.ops.direct_edges(*BAD[message](*problem()))


def test_wrong_options_are_named():
    tensors = problem()
    for message, options in {
        "activation: 'gelu' is unknown; known: identity, relu": {"activation": "gelu"},
        "kind: 'tv' is unknown; known: l1, mse, rms, signed": {"kind": "tv"},
        "slope: is of leaky_relu and elu": {"activation": "relu", "slope": 0.1},
        "parent_sd, child_sd: give both or neither": {"parent_sd": torch.ones(7)},
        "parent_sd: expected 7 standard deviations": {"parent_sd": torch.ones(6), "child_sd": torch.ones(6)},
        "child_sd: expected numbers >= 0, got -1": {"parent_sd": torch.ones(7), "child_sd": -torch.ones(6)},
    }.items():
        with pytest.raises(InputError, match=message):
            vf.ops.direct_edges(*tensors, **options)
