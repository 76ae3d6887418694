"""The op effect_reduction on every backend: values, gradients, transforms, threads, memory and bad input."""

import itertools
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from backends import ALL, CPP, one_of_each, parameters
from close import assert_close, assert_gradient_close
from hypothesis import given, settings
from strategies import FLOATS, Problem, effect_problem, outputs

import vaecirc_fast as vf
from vaecirc_fast import _native, _registry
from vaecirc_fast.errors import BackendError, InputError
from vaecirc_fast.reference import effect_reduction as reference

KINDS, LINKS = reference.KINDS, reference.LINKS
ROW = _registry.rows["effect_reduction"]
OP = torch.ops.vaecirc_fast.effect_reduction
OP_BACKWARD = torch.ops.vaecirc_fast.effect_reduction_backward


def kinds_of(link):
    """All effects that make sense under a link."""
    return KINDS if link == "sigmoid" else tuple(kind for kind in KINDS if kind != "logit_mse")


def run(problem, backend, **changes):
    """The op on the backend's device, result back on the CPU."""
    base, perturbed = (changes.get(name, getattr(problem, name)).to(backend.device) for name in ("base", "perturbed"))
    arguments = dict(groups=problem.groups, link=problem.link, reduce=problem.reduce)
    return vf.ops.effect_reduction(base, perturbed, problem.kinds, **arguments).cpu()


def runs(backend, dtype):
    """Whether the backend has a kernel for `dtype`; the row says so."""
    return ROW.why_not(backend.name, backend.device, dtype) is None


# --- truth, yardstick and unit ---------------------------------------------------------------------------------------


def formula(problem, base, perturbed):
    """The reference on the CPU, in the dtype of its arguments."""
    groups = problem.groups
    return reference.forward(
        base.flatten(1),
        perturbed.flatten(2),
        groups.labels,
        groups.order,
        groups.offsets,
        [KINDS.index(kind) for kind in problem.kinds],
        LINKS.index(problem.link),
        problem.reduce == "sum",
    )


def in_groups(values, groups):
    """Values (B, I, P) added up by group, in float64: (B, I, G)."""
    out = torch.zeros(*values.shape[:2], len(groups), dtype=torch.float64)
    return out.index_add(2, groups.labels[groups.order].long(), values[:, :, groups.order])


def differences(problem):
    """In float64: dy, the numbers that its rounding is relative to, and the raw difference."""
    x0, x = problem.base.double().flatten(1)[:, None], problem.perturbed.double().flatten(2)
    if problem.link == "identity":
        return x - x0, (x - x0).abs(), x - x0
    y0, y = x0.sigmoid(), x.sigmoid()
    return y - y0, (y - y0).abs() + y + y0, x - x0


def units(problem):
    """The unit of every result: what one rounding of each dy changes in it, for the comparison rule."""
    dy, unit, raw = differences(problem)
    eps = torch.finfo(torch.float64 if dy.dtype == problem.base.dtype else torch.float32).eps
    groups, sizes = problem.groups, problem.groups.sizes
    of = {
        "l1": lambda: in_groups(unit, groups) / sizes,
        "mse": lambda: in_groups(dy.abs() * unit + eps * unit.square(), groups) / sizes,
        "rms": lambda: (in_groups(unit.square(), groups) / sizes).sqrt(),
        "logit_mse": lambda: in_groups(raw.square(), groups) / sizes,
        "tv": lambda: in_groups(unit, groups) / 2,
        "signed": lambda: in_groups(unit, groups) / sizes,
    }
    out = torch.stack([of[kind]() for kind in problem.kinds], 2)
    truth = formula(problem, problem.base.double(), problem.perturbed.double())
    return torch.maximum(out.sum(0) if problem.reduce else out, truth.abs())


def terms(problem):
    """The largest number of added terms of a result."""
    return int(problem.groups.sizes.max()) * (max(1, len(problem.base)) if problem.reduce else 1)


def check(problem, backend, out=None):
    """The op's result against the reference, by the rule."""
    out = run(problem, backend) if out is None else out
    truth = formula(problem, problem.base.double(), problem.perturbed.double())
    yardstick = formula(problem, problem.base, problem.perturbed)
    assert_close(out, yardstick, truth, terms=terms(problem), unit=units(problem))


def gradients(function, problem, weight, device="cpu", dtype=None):
    """Gradients of sum(weight * function(base, perturbed)) for base and perturbed, on the CPU."""
    inputs = [x.detach().to(device, dtype).requires_grad_() for x in (problem.base, problem.perturbed)]
    out = function(*inputs)
    return [grad.cpu() for grad in torch.autograd.grad((out * weight.to(out)).sum(), inputs)]


def gradient_units(problem, weight):
    """The units of the two gradients: what one rounding of each factor changes in them."""
    dy, unit, raw = differences(problem)
    sizes, kept = problem.groups.sizes, problem.groups.labels >= 0
    of_element = problem.groups.labels.long().clamp(min=0)
    weight = weight.double().abs()
    if problem.reduce:
        weight = weight.expand(len(problem.base), *weight.shape)
    through, direct = torch.zeros_like(unit), torch.zeros_like(unit)
    for e, kind in enumerate(problem.kinds):
        of_mean = (weight[:, :, e] / sizes)[:, :, of_element] * kept
        if kind == "rms":
            rms = (in_groups(dy.square(), problem.groups) / sizes).sqrt()
            relative = 1 + (in_groups(unit.square(), problem.groups) / sizes).sqrt() / rms
            through += of_mean * unit * (relative / rms)[:, :, of_element]
        elif kind == "logit_mse":
            direct += 2 * of_mean * raw.abs()
        elif kind == "mse":
            through += 2 * of_mean * unit
        else:
            through += of_mean * (sizes[of_element] / 2 if kind == "tv" else 1)
    sigmoid = problem.link == "sigmoid"
    slope0 = problem.base.double().flatten(1).sigmoid()[:, None] if sigmoid else 1
    slope = problem.perturbed.double().flatten(2).sigmoid() if sigmoid else 1
    of_base, of_perturbed = (through * slope0 + direct).sum(1), through * slope + direct
    return of_base.view(problem.base.shape), of_perturbed.view(problem.perturbed.shape)


def check_gradients(problem, backend, got=None):
    """The op's gradients against autograd through the reference formula, by the rule with magnitudes."""
    shape = formula(problem, problem.base.double(), problem.perturbed.double()).shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    arguments = dict(groups=problem.groups, link=problem.link, reduce=problem.reduce)
    op = lambda base, perturbed: vf.ops.effect_reduction(base, perturbed, problem.kinds, **arguments)  # noqa: E731
    got = gradients(op, problem, weight, backend.device) if got is None else got
    if backend.interpreted and problem.base.dtype == torch.bfloat16:
        # The interpreter cuts a float to bfloat16 where a GPU rounds it: so the floats before the cut are compared.
        exact = replace(problem, base=problem.base.float(), perturbed=problem.perturbed.float())
        floats = gradients(op, exact, weight, backend.device)
        for grad, uncut in zip(got, floats, strict=True):
            assert torch.equal(grad, (uncut.view(torch.int32) >> 16 << 16).view(torch.float32).to(torch.bfloat16))
        problem, got = exact, floats
    plain = lambda base, perturbed: formula(problem, base, perturbed)  # noqa: E731
    truths = gradients(plain, problem, weight, dtype=torch.float64)
    yardsticks = gradients(plain, problem, weight)
    added = int(problem.groups.sizes.max()) + problem.perturbed.shape[1] * len(problem.kinds)
    for kernel, yardstick, truth, unit in zip(got, yardsticks, truths, gradient_units(problem, weight), strict=True):
        assert_gradient_close(kernel, yardstick, truth, terms=added, unit=torch.maximum(unit, truth.abs()))


# --- the problems ----------------------------------------------------------------------------------------------------


def labels_in_chunks(period, chunks):
    """Chunks of 16 elements whose labels repeat with a period, each chunk its own group."""
    return vf.groups.from_labels((torch.arange(chunks) % period).repeat_interleave(16))


def random_labels(elements, count, left_out=0.1, seed=0):
    """Any partition: every group taken, some elements left out."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, count, (elements,), generator=generator)
    labels[torch.rand(elements, generator=generator) < left_out] = -1
    labels[torch.randperm(elements, generator=generator)[:count]] = torch.arange(count)
    return vf.groups.from_labels(labels)


# name: samples, interventions, groups. The C++ kernel's own limits: chunks of 16 elements, tiles of 1024, 256 slots,
# 8 blocks of samples, 16 interventions a task.
CASES = {
    "whole": (2, 3, vf.groups.whole(4096)),
    "one element": (2, 2, vf.groups.whole(1)),
    "fifteen elements": (2, 2, vf.groups.whole(15)),
    "one past a chunk": (2, 2, vf.groups.whole(17)),
    "one past a tile": (2, 2, vf.groups.whole(1025)),
    "tiles and a rest": (1, 2, vf.groups.whole(2500)),
    "cells": (2, 2, vf.groups.cells(64, 64, 8)),
    "cells, uneven, channels": (2, 2, vf.groups.cells(20, 21, 6, channels=3)),
    "cells, two chunks a row": (2, 2, vf.groups.cells(32, 32, 16)),
    "cells, one chunk a row": (2, 2, vf.groups.cells(64, 16, 8)),
    "channels": (2, 2, vf.groups.channels(3, 18, 19)),
    "spans": (2, 2, vf.groups.spans([1, 2, 3, 5, 8, 13, 21, 34, 1])),
    "columns of one": (2, 2, vf.groups.spans([1] * 40)),
    "left out": (2, 2, vf.groups.from_labels([-1] * 20 + [0, -1, 1] * 30 + [-1] * 21)),
    "any labels": (2, 2, random_labels(1031, 7)),
    "any labels, many": (2, 1, random_labels(5003, 300)),
    "256 slots": (1, 2, labels_in_chunks(256, 300)),
    "257 slots": (1, 2, labels_in_chunks(257, 300)),
    "period of three": (1, 2, labels_in_chunks(3, 100)),
    "changing period": (1, 2, vf.groups.from_labels([0] * 1008 + [0] * 16 + [1] * 16 + ([0] * 16 + [1] * 16) * 70)),
    "no samples": (0, 2, vf.groups.cells(8, 8, 4)),
    "no interventions": (2, 0, vf.groups.cells(8, 8, 4)),
    "neither": (0, 0, vf.groups.cells(8, 8, 4)),
    "more samples than blocks": (19, 1, vf.groups.spans([5, 9])),
    "more interventions than a task": (2, 19, vf.groups.spans([20, 9])),
}


def problem_of(case, link="sigmoid", reduce=None, dtype=torch.float32, kinds=None):
    samples, interventions, groups = CASES[case]
    inputs = outputs(samples, interventions, len(groups.labels), dtype)
    return Problem(*inputs, groups, kinds or kinds_of(link), link, reduce)


MODES = list(itertools.product(LINKS, (None, "sum")))


def modes(backend):
    """Every link with every reduction; of the interpreter, which is slow, two that take other paths."""
    return [("identity", None), ("sigmoid", "sum")] if backend.interpreted else MODES


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_values(backend, case):
    for link, reduce in modes(backend):
        check(problem_of(case, link, reduce), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["cells", "tiles and a rest", "any labels", "any labels, many", "no samples"])
def test_values_in_other_dtypes(backend, case, dtype):
    if not runs(backend, dtype):
        with pytest.raises(BackendError, match=f"has no kernel for {dtype}"):
            run(problem_of(case, dtype=dtype), backend)
        return
    for link, reduce in modes(backend):
        check(problem_of(case, link, reduce, dtype), backend)


@pytest.mark.parametrize("groups", [vf.groups.cells(16, 16, 8), random_labels(4200, 260)], ids=["slots", "scattered"])
def test_each_effect_alone_and_any_two(backend, groups):
    for kinds in [(kind,) for kind in KINDS] + list(itertools.permutations(KINDS, 2))[::3]:
        for link in LINKS if "logit_mse" not in kinds else ("sigmoid",):
            check(Problem(*outputs(1, 1, len(groups.labels)), groups, kinds, link, None), backend)


@settings(max_examples=40)
@given(problem=effect_problem())
def test_any_problem(backend, problem):
    if runs(backend, problem.base.dtype):
        check(problem, backend)


@one_of_each
def test_one_name_gives_no_axis_of_effects(backend):
    problem = problem_of("cells")
    base, perturbed = problem.base.to(backend.device), problem.perturbed.to(backend.device)
    both = vf.ops.effect_reduction(base, perturbed, ["mse", "l1"], groups=problem.groups)
    assert both.shape == (2, 2, 2, 64)
    for e, kind in enumerate(("mse", "l1")):
        one = vf.ops.effect_reduction(base, perturbed, kind, groups=problem.groups)
        assert one.shape == (2, 2, 64)
        assert torch.equal(one, vf.ops.effect_reduction(base, perturbed, [kind], groups=problem.groups)[:, :, 0])
        unit = units(problem_of("cells", "identity", kinds=(kind,)))[:, :, 0]
        assert_close(both[:, :, e].cpu(), one.cpu(), one.cpu().double(), terms=64, unit=2 * unit)
    assert torch.equal(vf.ops.effect_reduction(base, perturbed), vf.ops.effect_reduction(base, perturbed, "l1"))


@one_of_each
def test_images_are_their_flattened_elements(backend):
    base, perturbed = (x.to(backend.device) for x in outputs(2, 3, 2 * 6 * 10))
    groups = vf.groups.cells(6, 10, 4, channels=2)
    flat = vf.ops.effect_reduction(base, perturbed, groups=groups)
    images = base.view(2, 2, 6, 10), perturbed.view(2, 3, 2, 6, 10)
    assert torch.equal(vf.ops.effect_reduction(*images, groups=groups), flat)


@one_of_each
def test_memory_layout_changes_nothing(backend):
    base, perturbed = (x.to(backend.device) for x in outputs(4, 3, 50))
    layouts = {
        "transposed": (base.T.contiguous().T, perturbed.mT.contiguous().mT),
        "every other": (base.repeat_interleave(2, 1)[:, ::2], perturbed.repeat_interleave(2, 1)[:, ::2]),
        "offset": (torch.cat([base[:1], base])[1:], torch.cat([perturbed[:1], perturbed])[1:]),
        "interventions outside": (base, perturbed.transpose(0, 1).contiguous().transpose(0, 1)),
        "expanded": (base[:1].expand(4, 50), perturbed[:1, :1].expand(4, 3, 50)),
        "one value": (base[:1, :1].expand(4, 50), perturbed[:1, :1, :1].expand(4, 3, 50)),
        "mixed": (base.T.contiguous().T, perturbed),
    }
    for (name, laid_out), (link, reduce) in itertools.product(layouts.items(), modes(backend)):
        problem = Problem(*laid_out, vf.groups.whole(50), ("l1", "mse"), link, reduce)
        if backend.name == "reference":  # torch adds in the order of memory
            check(problem, backend)
            check_gradients(problem, backend)
            continue
        contiguous = [x.clone(memory_format=torch.contiguous_format) for x in laid_out]
        op = lambda b, p: vf.ops.effect_reduction(b, p, ("l1", "mse"), link=link, reduce=reduce)  # noqa: B023, E731
        expected, got = op(*contiguous), op(*laid_out)
        assert torch.equal(got, expected), name
        weight = torch.linspace(1, 2, got.numel()).view(got.shape)
        same = replace(problem, base=contiguous[0], perturbed=contiguous[1])
        of_expected = gradients(op, same, weight, backend.device)
        for a, b in zip(gradients(op, problem, weight, backend.device), of_expected, strict=True):
            assert torch.equal(a, b), name


# --- the definition, apart from the reference ------------------------------------------------------------------------


def defined(dy, raw, kind):
    """One effect of one group, from its differences, as definitions in words have it."""
    n = len(dy)
    return {
        "l1": lambda: math.fsum(abs(d) for d in dy) / n,
        "mse": lambda: math.fsum(d * d for d in dy) / n,
        "rms": lambda: math.sqrt(math.fsum(d * d for d in dy) / n),
        "logit_mse": lambda: math.fsum(r * r for r in raw) / n,
        "tv": lambda: math.fsum(abs(d) for d in dy) / 2,
        "signed": lambda: math.fsum(dy) / n,
    }[kind]()


@pytest.mark.parametrize(("link", "reduce"), MODES)
def test_the_reference_is_the_definition(link, reduce):
    link_of = (lambda x: x) if link == "identity" else lambda x: 1 / (1 + math.exp(-x))
    groups = random_labels(23, 4)
    base, perturbed = outputs(3, 2, 23, torch.float64)
    problem = Problem(base, perturbed, groups, kinds_of(link), link, reduce)
    members = [[p for p, label in enumerate(groups.labels.tolist()) if label == g] for g in range(4)]
    rows = []
    for b, i, kind, group in itertools.product(range(3), range(2), problem.kinds, members):
        x0, x = [float(base[b, p]) for p in group], [float(perturbed[b, i, p]) for p in group]
        dy = [link_of(u) - link_of(u0) for u, u0 in zip(x, x0, strict=True)]
        rows.append(defined(dy, [u - u0 for u, u0 in zip(x, x0, strict=True)], kind))
    truth = torch.tensor(rows, dtype=torch.float64).view(3, 2, len(problem.kinds), 4)
    truth = truth.sum(0) if reduce else truth
    unit = torch.maximum(units(problem), truth.abs())
    assert_close(formula(problem, base, perturbed), truth, truth, terms=terms(problem), unit=unit)


# --- extreme values --------------------------------------------------------------------------------------------------


def sweep(dtype):
    """Logits, ascending: dense where the sigmoid is neither 0 nor 1, and every kind of special value."""
    info = torch.finfo(dtype)
    last = -math.log(info.tiny) + 2
    dense = torch.linspace(-last, last, 1 << 17, dtype=torch.float64).to(dtype)
    small = torch.logspace(math.log10(info.tiny * info.eps), 0, 2000, dtype=torch.float64).to(dtype)
    large = torch.logspace(0, math.log10(info.max), 500, dtype=torch.float64).to(dtype)
    special = torch.tensor([0.0, -0.0, info.tiny, info.max, info.min, math.inf, -math.inf, 1.0, -1.0], dtype=dtype)
    # Where the polynomial changes: multiples of ln 2 / 2 and the numbers beside them.
    edges = (torch.arange(-200, 201, dtype=torch.float64) * math.log(2) / 2).to(dtype)
    beside = torch.cat([edges.nextafter(edges + 1), edges, edges.nextafter(edges - 1)])
    return torch.cat([dense, small, -small, large, -large, special, beside])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_sigmoid_alone(backend, dtype):
    """Each element a group of its own, against a base whose probability is 0: the effect is the sigmoid."""
    x = sweep(dtype)
    groups = vf.groups.spans([1] * len(x))
    problem = Problem(torch.full((1, len(x)), -math.inf, dtype=dtype), x[None, None], groups, ("l1",), "sigmoid", None)
    got = run(problem, backend).flatten()
    if dtype == torch.float32:
        truth = x.double().sigmoid()
    else:
        import mpmath

        mpmath.mp.prec = 80
        keep = torch.cat([torch.arange(0, 1 << 17, 50), torch.arange(1 << 17, len(x))])
        x, got = x[keep], got[keep]
        truth = torch.tensor([float(1 / (1 + mpmath.exp(-mpmath.mpf(v)))) for v in x.tolist()], dtype=torch.float64)
    assert_close(got, x.sigmoid(), truth, terms=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("link", LINKS)
def test_large_and_small_numbers(backend, dtype, link):
    info = torch.finfo(dtype)
    values = [info.max, info.min, info.max**0.5, info.tiny, info.tiny * info.eps, info.tiny**0.5, 1e-3, 0.0, -0.0, 1.0]
    values += [-1.0, 30.0, -90.0, 100.0, -750.0]
    pairs = torch.tensor(list(itertools.product(values, values)), dtype=torch.float64).to(dtype)
    # Each by itself, and 25 to a group: there their sums must not overflow, since the order decides that.
    for sizes, x in (([1] * len(pairs), pairs), ([25] * (len(pairs) // 25), pairs / 64)):
        groups = vf.groups.spans(sizes)
        check(Problem(x[:, 0][None], x[:, 1][None, None], groups, kinds_of(link), link, None), backend)


def test_equal_outputs_have_no_effect_and_no_gradient(backend):
    """Zero, not only small: also of -0.0 against 0.0, of infinite logits, and the gradient of rms, where dy is 0."""
    base = torch.tensor([[0.0, -0.0, 1.5, -3e38, 20.0, -1e-40, 0.25]])
    perturbed = torch.tensor([[[-0.0, 0.0, 1.5, -3e38, 20.0, -1e-40, 0.25]]])
    for link in LINKS:
        problem = Problem(base, perturbed, vf.groups.spans([2, 5]), kinds_of(link), link, None)
        assert torch.equal(run(problem, backend), torch.zeros(1, 1, len(problem.kinds), 2))
        arguments = dict(groups=problem.groups, link=link)
        for kind in [kind for kind in problem.kinds if kind != "signed"]:
            op = lambda b, p, kind=kind: vf.ops.effect_reduction(b, p, kind, **arguments)  # noqa: B023, E731
            for grad in gradients(op, problem, torch.ones(1, 1, 2), backend.device):
                assert torch.equal(grad, torch.zeros_like(grad)), kind


@pytest.mark.parametrize("case", ["cells", "any labels", "any labels, many", "one past a tile"])
@pytest.mark.parametrize("where", ["base", "perturbed"])
def test_nan_reaches_its_group_only(backend, where, case):
    for link, reduce in modes(backend):
        problem = problem_of(case, link, reduce)
        at = len(problem.groups.labels) - 3
        while problem.groups.labels[at] < 0:
            at -= 1
        group = int(problem.groups.labels[at])
        spoilt = getattr(problem, where).clone()
        spoilt[-1, ..., at] = math.nan
        clean, got = run(problem, backend), run(problem, backend, **{where: spoilt})
        hit = torch.zeros_like(got, dtype=torch.bool)
        hit[(..., group) if reduce else (-1, ..., group)] = True
        assert bool(got[hit].isnan().all())
        assert torch.equal(got[~hit], clean[~hit])


def test_nan_and_infinity_outside_every_group_are_not_seen(backend):
    problem = problem_of("left out", kinds=("l1", "mse", "rms", "tv", "signed"))
    problem.perturbed[..., problem.groups.labels < 0] = math.nan
    problem.base[..., 0] = math.inf
    assert bool(run(problem, backend).isfinite().all())
    check_left_out = gradients(
        lambda b, p: vf.ops.effect_reduction(b, p, problem.kinds, groups=problem.groups, link="sigmoid"),
        problem,
        torch.ones(2, 2, 5, 2),
        backend.device,
    )
    for grad in check_left_out:
        assert torch.equal(grad[..., problem.groups.labels < 0], torch.zeros_like(grad[..., problem.groups.labels < 0]))
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize("link", LINKS)
def test_infinity(backend, link):
    infinite = torch.tensor([math.inf, -math.inf, 1.0, -2.0])
    pairs = torch.tensor(list(itertools.product(infinite.tolist(), infinite.tolist())))
    groups = vf.groups.spans([1] * len(pairs))
    problem = Problem(pairs[:, 0][None], pairs[:, 1][None, None], groups, kinds_of(link), link, None)
    truth = formula(problem, problem.base.double(), problem.perturbed.double())
    yardstick = formula(problem, problem.base, problem.perturbed)
    unit = torch.where(truth.isfinite(), truth.abs() + 2, truth.abs())
    assert_close(run(problem, backend), yardstick, truth, terms=1, unit=unit)


# --- gradients -------------------------------------------------------------------------------------------------------


GRADIENT_CASES = ["whole", "one element", "cells", "channels", "left out", "any labels", "one past a tile"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_gradients(backend, case, dtype):
    if runs(backend, dtype):
        for link, reduce in modes(backend):
            check_gradients(problem_of(case, link, reduce, dtype), backend)


@pytest.mark.parametrize("case", ["no samples", "no interventions", "neither"])
def test_gradients_of_nothing(backend, case):
    for link, reduce in modes(backend):
        problem = problem_of(case, link, reduce)
        op = lambda b, p: vf.ops.effect_reduction(b, p, link=link, reduce=reduce)  # noqa: B023, E731
        weight = torch.ones(op(problem.base, problem.perturbed).shape)
        of_base, of_perturbed = gradients(op, problem, weight, backend.device)
        assert torch.equal(of_base, torch.zeros_like(problem.base))
        assert torch.equal(of_perturbed, torch.zeros_like(problem.perturbed))


@pytest.mark.parametrize("groups", [vf.groups.cells(8, 4, 2), random_labels(70, 9)], ids=["cells", "any labels"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_each_effect_alone(backend, kind, groups):
    for link, reduce in modes(backend):
        if kind in kinds_of(link):
            check_gradients(Problem(*outputs(3, 2, len(groups.labels)), groups, (kind,), link, reduce), backend)


@settings(max_examples=15)
@given(problem=effect_problem(least=1))
def test_any_gradient(backend, problem):
    if runs(backend, problem.base.dtype):
        check_gradients(problem, backend)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(backend, kind):
    groups = vf.groups.from_labels([0, 1, -1, 1, 1])
    inputs = [x.to(backend.device, torch.float64).requires_grad_() for x in outputs(2, 2, 5)]
    for link, reduce in modes(backend):
        if kind in kinds_of(link):
            op = lambda b, p: vf.ops.effect_reduction(b, p, kind, groups=groups, link=link, reduce=reduce)  # noqa: B023, E731
            # Of the interpreter, which is slow, in random directions rather than in each.
            assert torch.autograd.gradcheck(op, inputs, fast_mode=backend.interpreted)


@one_of_each
def test_the_gradient_of_one_input_alone(backend):
    problem = problem_of("cells", kinds=("l1", "rms"))
    op = lambda b, p: vf.ops.effect_reduction(b, p, problem.kinds, groups=problem.groups, link="sigmoid")  # noqa: E731
    both = gradients(op, problem, torch.ones(2, 2, 2, 64), backend.device)
    base, perturbed = problem.base.to(backend.device), problem.perturbed.to(backend.device)
    for n in (0, 1):
        inputs = [base.clone(), perturbed.clone()]
        out = op(inputs[0].requires_grad_(n == 0), inputs[1].requires_grad_(n == 1))
        assert torch.equal(torch.autograd.grad(out.sum(), inputs[n])[0].cpu(), both[n])
    with torch.no_grad():
        assert not op(base.requires_grad_(), perturbed).requires_grad


def test_nan_reaches_the_gradient_of_its_group_only(backend):
    """The NaN element's own gradient is NaN, never a number; another group, or an effect not asked for, adds none."""
    groups = vf.groups.spans([7, 30])
    for kind, (link, reduce) in itertools.product(KINDS, modes(backend)):
        if kind not in kinds_of(link):
            continue
        problem = Problem(*outputs(2, 2, 37), groups, (kind,), link, reduce)
        op = lambda b, p: vf.ops.effect_reduction(b, p, kind, groups=groups, link=link, reduce=reduce)  # noqa: B023, E731
        weight = torch.ones(op(problem.base, problem.perturbed).shape)
        clean = gradients(op, problem, weight, backend.device)
        spoilt = problem.perturbed.detach().clone()
        spoilt[1, 0, 3] = math.nan
        of_base, of_perturbed = gradients(op, replace(problem, perturbed=spoilt), weight, backend.device)
        # The gradient of "signed" depends on no value, but through the slope of its own link.
        assert bool(of_perturbed[1, 0, 3].isnan()) != (kind == "signed" and link == "identity")
        assert bool(of_base[1, 3].isnan()) != (kind == "signed")
        group = slice(0, 7) if kind == "rms" else slice(3, 4)  # rms is NaN, and divides by itself
        of_base[1, group], of_perturbed[1, 0, group] = clean[0][1, group], clean[1][1, 0, group]
        assert torch.equal(of_base, clean[0])
        assert torch.equal(of_perturbed, clean[1])


def test_an_infinite_difference_has_the_gradient_of_its_sign(backend):
    base, perturbed = torch.zeros(1, 4), torch.tensor([[[math.inf, -math.inf, 1.0, -2.0]]])
    problem = Problem(base, perturbed, vf.groups.whole(4), ("l1",), "identity", None)
    of_base, of_perturbed = gradients(vf.ops.effect_reduction, problem, torch.ones(1, 1, 1), backend.device)
    assert of_perturbed.flatten().tolist() == [0.25, -0.25, 0.25, -0.25]
    assert of_base.flatten().tolist() == [-0.25, 0.25, -0.25, 0.25]
    infinite = Problem(base + math.inf, -perturbed, vf.groups.whole(4), ("l1",), "sigmoid", None)
    for grad in gradients(lambda b, p: vf.ops.effect_reduction(b, p, link="sigmoid"), infinite, torch.ones(1, 1, 1)):
        assert bool(grad.isfinite().all())


@one_of_each
def test_there_is_no_second_derivative(backend):
    base, perturbed = (x.to(backend.device).requires_grad_() for x in outputs(2, 2, 5))
    (grad,) = torch.autograd.grad(vf.ops.effect_reduction(base, perturbed, "mse").sum(), base, create_graph=True)
    with pytest.raises(NotImplementedError, match="effect_reduction has no second derivative"):
        grad.sum().backward()


def test_a_gradient_runs_where_its_forward_was_forced_to(monkeypatch):
    called = []
    cpp = ROW.cells["cpp"]

    def load():
        return {name: lambda *a, name=name: called.append(name) or cpp.load()[name](*a) for name in cpp.load()}

    monkeypatch.setitem(ROW.cells, "cpp", _registry.Kernel(load, cpp.devices, cpp.dtypes, cpp.reason))
    base, perturbed = (x.requires_grad_() for x in outputs(2, 2, 5))
    with vf.backend("reference"):
        out = vf.ops.effect_reduction(base, perturbed, "rms")
    out.sum().backward()
    assert called == []
    vf.ops.effect_reduction(base, perturbed, "rms").sum().backward()
    assert called == ["effect_reduction", "effect_reduction", "effect_reduction_backward"]


# --- vmap, torch.library, torch.compile ------------------------------------------------------------------------------


@one_of_each
@pytest.mark.parametrize("in_dims", [(0, 0), (1, 2), (None, 0), (0, None)], ids=str)
def test_vmap(backend, in_dims):
    """Values and gradients under vmap are those of a loop."""
    groups, batch = random_labels(30, 4), 3
    base, perturbed = zip(*(outputs(2, 2, 30, seed=n) for n in range(batch)), strict=True)
    several = [("rms", "tv")] if backend.interpreted else [("l1",), ("rms", "tv")]
    for kinds, (link, reduce) in itertools.product(several, modes(backend)):
        of = lambda v, dim: 0 if dim is None else v  # noqa: E731
        problems = [
            Problem(base[of(v, in_dims[0])], perturbed[of(v, in_dims[1])], groups, kinds, link, reduce)
            for v in range(batch)
        ]
        stacked = [
            tensors[0] if dim is None else torch.stack(tensors, dim)
            for tensors, dim in zip((base, perturbed), in_dims, strict=True)
        ]
        stacked = [x.to(backend.device) for x in stacked]
        op = lambda b, p: vf.ops.effect_reduction(b, p, kinds, groups=groups, link=link, reduce=reduce)  # noqa: B023, E731
        out = torch.vmap(op, in_dims)(*stacked)
        weight = torch.randn(out.shape[1:], generator=torch.Generator().manual_seed(1)).to(backend.device)
        gradient = torch.func.grad(lambda b, p: (op(b, p) * weight).sum(), argnums=(0, 1))  # noqa: B023
        grads = torch.vmap(gradient, in_dims)(*stacked)
        for v, problem in enumerate(problems):
            check(problem, backend, out[v].cpu())
            check_gradients(problem, backend, [grad[v].cpu() for grad in grads])


@one_of_each
def test_grad_of_vmap_and_vmap_of_vmap(backend):
    base, perturbed = (x.to(backend.device) for x in outputs(6, 2, 10))
    base, perturbed = base.view(3, 2, 1, 10), perturbed.view(3, 2, 1, 2, 10)
    op = lambda b, p: vf.ops.effect_reduction(b, p, ["rms", "l1"])  # noqa: E731
    flat = lambda b, p: op(b.view(6, 10), p.view(6, 2, 10)).view(3, 2, 1, 2, 2, 1)  # noqa: E731
    twice = torch.vmap(torch.vmap(op))
    assert torch.equal(twice(base, perturbed), flat(base, perturbed))
    for argument in (0, 1):
        got = torch.func.grad(lambda b, p: twice(b, p).sum(), argnums=argument)(base, perturbed)
        expected = torch.func.grad(lambda b, p: flat(b, p).sum(), argnums=argument)(base, perturbed)
        assert torch.equal(got, expected)
    jacobian = torch.func.jacrev(lambda b: op(b, perturbed[0, 0]))(base[0, 0])
    for i, e in itertools.product(range(2), range(2)):
        expected = torch.func.grad(lambda b, i=i, e=e: op(b, perturbed[0, 0])[0, i, e, 0])(base[0, 0])
        assert torch.equal(jacobian[0, i, e, 0], expected)


def op_arguments(problem, device="cpu"):
    groups = problem.groups.to(device)
    kinds, link = [KINDS.index(kind) for kind in problem.kinds], LINKS.index(problem.link)
    inputs = problem.base.to(device).requires_grad_(), problem.perturbed.to(device).requires_grad_()
    return *inputs, groups.labels, groups.order, groups.offsets, kinds, link, problem.reduce == "sum"


@one_of_each
@pytest.mark.parametrize("reduce", [None, "sum"])
def test_the_registered_ops_pass_opcheck(backend, reduce):
    groups = random_labels(20, 4)
    problem = Problem(*outputs(3, 2, 20), groups, kinds_of("sigmoid"), "sigmoid", reduce)
    arguments = op_arguments(problem, backend.device)
    torch.library.opcheck(OP.default, arguments)
    factors = torch.randn(1 if reduce else 3, 2, 4, 4).to(backend.device)
    inputs = [x.detach() for x in arguments[:5]]
    torch.library.opcheck(OP_BACKWARD.default, (*inputs, factors, arguments[6]))


@one_of_each
def test_the_registered_op_is_the_op(backend):
    for reduce in (None, "sum"):
        problem = problem_of("any labels", reduce=reduce)
        arguments = op_arguments(problem, backend.device)
        out = OP(*arguments)
        assert torch.equal(out.detach().cpu(), run(problem, backend))
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(backend.device)
        check_gradients(problem, backend, [g.cpu() for g in torch.autograd.grad((out * weight).sum(), arguments[:2])])
        stacked = [torch.stack([x.detach(), x.detach() + 1]) for x in arguments[:2]]
        for v, one in enumerate(torch.vmap(lambda b, p, rest=arguments[2:]: OP(b, p, *rest))(*stacked)):
            check(problem, backend, one.cpu()) if v == 0 else None


def check_compiled(backend, compiler):
    torch._dynamo.reset()
    groups = random_labels(40, 4)
    several = [(groups, ("rms", "l1"), "sum"), (groups, kinds_of("sigmoid"), None), (None, ("mse",), None)]
    for partition, kinds, reduce in several:
        options = dict(groups=partition, link="sigmoid", reduce=reduce)
        op = lambda b, p: vf.ops.effect_reduction(b * 1, p * 1, kinds, **options)  # noqa: B023, E731
        compiled = torch.compile(op, fullgraph=True, backend=compiler)
        problem = Problem(*outputs(3, 2, 40), partition or vf.groups.whole(40), kinds, "sigmoid", reduce)
        weight = torch.randn(formula(problem, problem.base, problem.perturbed).shape)
        weight = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        check_gradients(problem, backend, gradients(compiled, problem, weight, backend.device))
        with torch.no_grad():
            out = compiled(problem.base.to(backend.device), problem.perturbed.to(backend.device))
        check(problem, backend, out.cpu())


@one_of_each
def test_compiled_without_breaks(backend):
    check_compiled(backend, "aot_eager")


@pytest.mark.deep
@one_of_each
def test_compiled_by_inductor(backend):
    check_compiled(backend, "inductor")


@one_of_each
def test_a_trace_holds_the_registered_op(backend):
    """make_fx sees the op and its gradient, and not a constant that a kernel made behind its back."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def gradient(base, perturbed):
        base = base.detach().requires_grad_()
        return torch.autograd.grad(vf.ops.effect_reduction(base, perturbed, "rms").sum(), base)[0]

    inputs = [x.to(backend.device) for x in outputs(2, 2, 5)]
    graph = make_fx(gradient)(*inputs)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert "vaecirc_fast.effect_reduction.default" in targets
    assert "vaecirc_fast.effect_reduction_backward.default" in targets
    others = [x.to(backend.device) for x in outputs(2, 2, 5, seed=1)]
    assert torch.equal(graph(*others), gradient(*others))


# --- memory, threads, processes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", parameters(CPP))
@pytest.mark.parametrize("wrong", ["one element not written", "a factor", "one sample dropped"])
def test_a_wrong_kernel_is_found(backend, wrong, monkeypatch):
    """The checks of this file bite: planted around the real kernel, each of these makes them fail."""
    cpp = ROW.cells["cpp"]

    def forward(base, perturbed, *rest):
        right = cpp.load()["effect_reduction"](base, perturbed, *rest)
        if wrong == "a factor":
            return right * 1.001
        if wrong == "one sample dropped":
            return right - cpp.load()["effect_reduction"](base[:1], perturbed[:1], *rest)
        out = torch.empty_like(right)
        out.view(-1)[1:] = right.view(-1)[1:]
        return out

    problem = problem_of("any labels", reduce="sum")
    with backend.forced():
        check(problem, backend)
        kernels = {**cpp.load(), "effect_reduction": forward}
        monkeypatch.setitem(ROW.cells, "cpp", _registry.Kernel(lambda: kernels, cpp.devices, cpp.dtypes, cpp.reason))
        with pytest.raises(AssertionError, match="element"):
            check(problem, backend)


@pytest.mark.parametrize("wrong", ["one element not written", "a factor"])
def test_a_wrong_gradient_is_found(wrong, monkeypatch):
    cpp, backend = ROW.cells["cpp"], CPP[-1]

    def backward(*arguments):
        *inputs, factors, link = arguments
        kernel = cpp.load()["effect_reduction_backward"]
        of_base, right = kernel(*inputs, factors * 1.001 if wrong == "a factor" else factors, link)
        if wrong == "a factor":
            return of_base, right
        out = torch.empty_like(right)
        out.view(-1)[1:] = right.view(-1)[1:]
        return of_base, out

    kernels = {**cpp.load(), "effect_reduction_backward": backward}
    with backend.forced():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            problem = problem_of("whole", dtype=dtype)
            check_gradients(problem, backend)
            with monkeypatch.context() as planted:
                wrong_cell = _registry.Kernel(lambda: kernels, cpp.devices, cpp.dtypes, cpp.reason)
                planted.setitem(ROW.cells, "cpp", wrong_cell)
                with pytest.raises(AssertionError, match="element|row"):
                    check_gradients(problem, backend)


def test_new_memory_is_poisoned():
    """The fixtures of these tests work: of torch's memory and, on glibc, of malloc's."""
    x = torch.ones(3)
    fresh = (torch.empty(3), torch.empty_like(x), x.new_empty(3), torch.empty_strided((3,), (1,)), torch.Tensor(3))
    assert all(bool(t.isnan().all()) for t in fresh)
    import ctypes
    import platform

    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        for size in (1 << 13, 1 << 22):  # smaller blocks may come from a cache that is not filled
            address = libc.malloc(size)
            assert ctypes.string_at(address, 64) == b"\x7f" * 64
            libc.free(address)


# Enough elements for C++ to start threads, and tasks that two threads cannot share equally.
LARGE = (3, 17, vf.groups.cells(74, 74, 9))


@pytest.mark.parametrize("backend", parameters(CPP))
def test_threads_and_repetition_change_no_bit(backend):
    samples, interventions, groups = LARGE
    with backend.forced():
        for dtype, (link, reduce) in itertools.product((torch.float32, torch.bfloat16), MODES):
            problem = Problem(*outputs(samples, interventions, 74 * 74, dtype), groups, kinds_of(link), link, reduce)
            op = lambda b, p: vf.ops.effect_reduction(b, p, problem.kinds, groups=groups, link=link, reduce=reduce)  # noqa: B023, E731
            results = []
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                assert _native.threads(problem.perturbed.numel()) == threads
                out = op(problem.base, problem.perturbed)
                results.append([out, *gradients(op, problem, torch.ones_like(out))])
            torch.set_num_threads(1)
            for again in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))
            check(problem, backend, results[1][0])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", parameters([b for b in ALL if b.device == "cuda"]))
def test_repetition_changes_no_bit_on_a_gpu(backend):
    """Its blocks run in any order."""
    samples, interventions, groups = LARGE
    for link, reduce in MODES:
        problem = Problem(*outputs(samples, interventions, len(groups.labels)), groups, kinds_of(link), link, reduce)
        op = lambda b, p: vf.ops.effect_reduction(b, p, problem.kinds, groups=groups, link=link, reduce=reduce)  # noqa: B023, E731
        first = None
        for _ in range(3):
            with backend.forced():
                out = run(problem, backend)
                results = [out, *gradients(op, problem, torch.ones_like(out), backend.device)]
            first = first or results
            assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


FORK = """
import os, sys, torch, vaecirc_fast as vf
from vaecirc_fast import _native
torch.set_num_threads(2)
base, perturbed = torch.zeros(4, 4096), torch.ones(4, 20, 4096)
def call():
    with vf.backend("cpp"):
        return vf.ops.effect_reduction(base, perturbed, "l1", reduce="sum")
assert _native.threads(perturbed.numel()) == 2
expected = call()  # starts the parent's threads
child = os.fork()
if child == 0:
    assert _native.threads(perturbed.numel()) == 1
    os._exit(0 if bool((call() == expected).all()) else 3)
_, status = os.waitpid(child, 0)
assert bool((call() == expected).all())
print("child", os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_does_not_hang():
    process = subprocess.Popen([sys.executable, "-c", FORK], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        printed, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail("the child waits for ever")
    assert printed == "child 0\n"


def available_memory():
    with open("/proc/meminfo") as file:
        return int(next(line for line in file if line.startswith("MemAvailable")).split()[1]) * 1024


@pytest.mark.deep
@pytest.mark.parametrize("backward", [False, True])
def test_offsets_beyond_32_bits(backend, backward):
    """More than 2^31 elements: only the last row differs from the base, and only it has an effect and a gradient."""
    elements, rows = 1 << 20, (1 << 11) + 1
    if backend.name == "reference" or (backward and backend == ALL[-1] and backend.device == "cpu"):
        pytest.skip("takes too much memory or, interpreted, time")
    if backend.device == "cpu" and available_memory() < (6 + 5 * backward) * 2**30:
        pytest.skip("not enough memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    # A few elements kept, at the end: the interpreter then has little to do.
    labels = torch.full((elements,), -1, dtype=torch.int32)
    labels[-16:] = 0
    groups = vf.groups.from_labels(labels)
    for shape in ((1, rows), (rows, 1)):
        base = torch.zeros(shape[0], elements, dtype=torch.bfloat16, device=backend.device)
        perturbed = torch.zeros(*shape, elements, dtype=torch.bfloat16, device=backend.device)
        perturbed[-1, -1] = 0.5
        if backward:
            perturbed.requires_grad_()
        out = vf.ops.effect_reduction(base, perturbed, "signed", groups=groups)
        expected = torch.zeros(*shape, 1)
        expected[-1, -1] = 0.5
        assert torch.equal(out.detach().cpu(), expected)
        if backward:
            out[-1, -1, 0].backward()
            assert perturbed.grad[-1, -1].unique().tolist() == [0, 1 / 16]
            assert int(perturbed.grad[-1, -1].count_nonzero()) == 16
            assert int(perturbed.grad.view(-1)[:-elements].count_nonzero()) == 0
        del base, perturbed, out


# --- bad input -------------------------------------------------------------------------------------------------------


def bad(base=(2, 4), perturbed=(2, 3, 4), dtype=torch.float32, **others):
    """Arguments of which one is wrong; tensors by their shape."""
    tensors = {
        name: torch.zeros(x, dtype=dtype) if isinstance(x, tuple) else x
        for name, x in (("base", base), ("perturbed", perturbed))
    }
    return tensors | others


BAD = {
    "unknown effect": (bad(effect="l2"), r"^effect: 'l2' is unknown; known: l1, mse, rms, logit_mse, tv, signed$"),
    "unknown among several": (bad(effect=["l1", "L1"]), r"^effect: 'L1' is unknown"),
    "no effect": (bad(effect=[]), r"^effect: expected at least one name"),
    "effect twice": (bad(effect=["l1", "l1"]), r"^effect: expected a name or a sequence of different names"),
    "effect no name": (bad(effect=1), r"^effect: expected a name or a sequence of different names, got 1"),
    "unknown link": (bad(link="softmax"), r"^link: 'softmax' is unknown; known: identity, sigmoid$"),
    "logit_mse of outputs": (bad(effect="logit_mse"), r'^effect: "logit_mse" is taken before the link, so pass logits'),
    "unknown reduce": (bad(reduce="mean"), r"^reduce: expected None or \"sum\", got 'mean'$"),
    "groups no Groups": (bad(groups="cells"), r"^groups: expected Groups, .* got str$"),
    "groups of others": (bad(groups=vf.groups.whole(5)), r"^groups: partition 5 elements, but an output has 4$"),
    "no tensor": (bad(base=[1.0]), r"^base, perturbed: expected tensors, got list and Tensor$"),
    "other samples": (bad(base=(3, 4)), r"^perturbed: expected shape \(B, I, ...\) .* got \(2, 3, 4\) for \(3, 4\)$"),
    "other elements": (bad(base=(2, 5)), r"^perturbed: expected shape"),
    "no interventions axis": (bad(perturbed=(2, 4)), r"^perturbed: expected shape"),
    "one axis": (bad(base=(2,), perturbed=(2, 3)), r"^perturbed: expected shape"),
    "no elements": (bad((2, 0), (2, 3, 0)), r"^base: an output must have at least one element, got shape \(2, 0\)$"),
    "integers": (bad(dtype=torch.int64), r"^base, perturbed: expected one floating dtype, got torch.int64 and"),
    "complex": (bad(dtype=torch.complex64), r"^base, perturbed: expected one floating dtype"),
    "mixed dtypes": (bad(base=torch.zeros(2, 4).double()), r"one floating dtype, got torch.float64 and torch.float32$"),
    "mixed devices": (
        bad(base=torch.zeros(2, 4, device="meta")),
        r"^base, perturbed: expected one device, got meta and",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    arguments, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        vf.ops.effect_reduction(**arguments)
    assert "\n" not in str(caught.value)


def test_a_backend_that_cannot_run_is_an_error():
    base, perturbed = outputs(2, 3, 4)
    for name, dtype, reason in (("cuda", torch.float32, ""), ("cpp", torch.float16, "has no kernel for torch.float16")):
        inputs = base.to(dtype), perturbed.to(dtype)
        with (
            vf.backend(name),
            pytest.raises(BackendError, match=f"^effect_reduction: backend '{name}' .* but {reason}"),
        ):
            vf.ops.effect_reduction(*inputs)
        # Not forced, the next of the order takes it.
        assert vf.ops.effect_reduction(*inputs).dtype == torch.float32
