"""The op sparse_adam on every backend: torch's Adam over several steps, threads, memory, transforms, bad input."""

import itertools
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from backends import CPP, one_of_each, parameters
from close import assert_close
from hypothesis import given
from hypothesis import strategies as st

import vaecirc_fast as vf
from vaecirc_fast import _native, _registry
from vaecirc_fast.errors import BackendError, InputError

ROW = _registry.rows["sparse_adam"]
OP = torch.ops.vaecirc_fast.sparse_adam
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STEPS = 3


@dataclass(frozen=True)
class Problem:
    """A matrix, a bias or none, the entries and g of each step, and the options of Adam."""

    param: torch.Tensor
    bias: torch.Tensor | None
    steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]  # values, indices, g, offsets
    options: dict

    def to(self, dtype, device="cpu"):
        """The same in another dtype, on a device."""
        move = lambda x: None if x is None else x.to(device, dtype if x.is_floating_point() else None)  # noqa: E731
        steps = [tuple(move(x) for x in step) for step in self.steps]
        return replace(self, param=move(self.param), bias=move(self.bias), steps=steps)


def problem(rows, latents, width, dtype=torch.float32, bias=True, steps=STEPS, seed=0, **options):
    """rows: (B, K), or the lengths of B rows. Some values are 0, and some indices of a row equal."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    fixed = isinstance(rows, tuple)
    count, shape = (rows[0], rows) if fixed else (len(rows), (sum(rows),))
    offsets = None if fixed else torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32)
    made = []
    for _ in range(steps):
        values = normal(*shape) * (torch.rand(shape, generator=generator) > 0.2)
        indices = torch.randint(0, latents, shape, generator=generator, dtype=torch.int32)
        made.append((values, indices, normal(count, width), offsets))
    options = {"lr": 0.01, **options}
    return Problem(normal(latents, width), normal(latents) if bias else None, made, options).to(dtype)


# name: rows, latents, width. The C++ kernel's own limits: vectors of 4, 8 or 16 floats, blocks of 8, 4 and 1 of them.
CASES = {
    "one number": ((1, 1), 1, 1),
    "three columns": ((3, 5), 7, 3),
    "a vector": ((3, 17), 9, 16),
    "past a vector": ((3, 16), 9, 17),
    "odd": ((5, 19), 40, 77),
    "every block and a rest": ((3, 7), 11, 128 + 64 + 32 + 5),
    "most latents without entries": ((4, 3), 100, 24),
    "no entries": ((3, 0), 4, 5),
    "no rows": ((0, 3), 4, 5),
    "no width": ((3, 2), 4, 0),
    "lengths": ([3, 0, 1, 40, 0, 17], 13, 20),
}
OPTIONS = {
    "plain": {},
    "betas": {"betas": (0.5, 0.6), "eps": 0.01, "lr": 0.3},
    "no momentum": {"betas": (0.0, 0.0)},
    "weight decay": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled": True},
}


def runs(backend, dtype):
    """Whether the backend has a kernel for `dtype`; the row says so."""
    return ROW.why_not(backend.name, backend.device, dtype) is None


def run(p, backend="auto", device="cpu", call=None):
    """The op over all steps, from moments of 0: param, its moments and, where there is one, those of the bias."""
    with vf.backend(backend):
        p = p.to(p.param.dtype, device)
        state = [p.param.clone(), torch.zeros_like(p.param), torch.zeros_like(p.param)]
        biases = [] if p.bias is None else [p.bias.clone(), torch.zeros_like(p.bias), torch.zeros_like(p.bias)]
        names = dict(zip(("bias", "bias_exp_avg", "bias_exp_avg_sq"), biases, strict=False))
        for n, (values, indices, g, offsets) in enumerate(p.steps):
            options = {**p.options, **names, "step": n + 1, "offsets": offsets}
            assert (call or vf.ops.sparse_adam)(*state, values, indices, g, **options) is None
        return [x.cpu() for x in (*state, *biases)]


# --- truth, yardstick and unit ---------------------------------------------------------------------------------------


def dense(step, latents):
    """The gradients of a step, and the sums of the magnitudes they are made of: (M, D + 1), the last is the bias's."""
    values, indices, g, offsets = step
    rows = len(g)
    lengths = torch.full((rows,), indices.shape[-1]) if offsets is None else offsets.diff().long()
    codes = torch.zeros(rows, latents, dtype=values.dtype)
    at = torch.arange(rows).repeat_interleave(lengths), indices.flatten().long()
    codes = codes.index_put(at, values.flatten(), accumulate=True)
    sizes = torch.zeros_like(codes).index_put(at, values.flatten().abs(), accumulate=True)
    g = torch.cat([g, torch.ones(rows, 1, dtype=g.dtype)], 1)
    return codes.T @ g, sizes.T @ g.abs()


def truth_and_units(p):
    """What torch.optim.Adam makes of the dense gradients, in float64; and the unit of each number."""
    p = p.to(torch.float64)
    latents = len(p.param)
    bias = torch.zeros(latents, dtype=torch.float64) if p.bias is None else p.bias
    # The bias as one more column: all numbers are treated alike.
    param = torch.cat([p.param, bias[:, None]], 1).requires_grad_()
    options = {key: value for key, value in p.options.items() if key != "decoupled"}
    kind = torch.optim.AdamW if p.options.get("decoupled") else torch.optim.Adam
    optimiser = kind([param], **{"weight_decay": 0.0, **options})
    beta1, beta2 = p.options.get("betas", (0.9, 0.999))
    decay = 0 if p.options.get("decoupled") else p.options.get("weight_decay", 0)
    of_param, of_m, of_v = param.detach().abs(), torch.zeros_like(param), torch.zeros_like(param)
    m = v = torch.zeros_like(param)
    for n, step in enumerate(p.steps):
        param.grad, size = dense(step, latents)
        size = size + decay * param.detach().abs()
        optimiser.step()
        m, v = (optimiser.state[param][key] for key in ("exp_avg", "exp_avg_sq"))
        of_m = beta1 * of_m + (1 - beta1) * size
        of_v = beta2 * of_v + (1 - beta2) * size.square()
        # An error of v changes the step by half of its own part of v.
        denominator = (v / (1 - beta2 ** (n + 1))).sqrt() + p.options.get("eps", 1e-8)
        share = torch.where(v == 0, 0, of_v / v)
        of_param = of_param + p.options["lr"] / (1 - beta1 ** (n + 1)) * of_m / denominator * (1 + share)
    parts = [(param.detach(), of_param), (m, of_m), (v, of_v)]
    parts = [(x[:, :-1], unit[:, :-1]) for x, unit in parts] + [(x[:, -1], unit[:, -1]) for x, unit in parts]
    return parts if p.bias is not None else parts[:3]


def check(p, backend, got=None):
    """The op's results against torch.optim.Adam's, by the rule."""
    got = run(p, backend.name, backend.device) if got is None else got
    terms = p.steps[0][0].numel() + 10 * len(p.steps)
    for kernel, yardstick, (truth, unit) in zip(got, run(p, "reference"), truth_and_units(p), strict=True):
        assert_close(kernel, yardstick, truth, terms=terms, unit=torch.maximum(unit, truth.abs()))


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_steps(backend, case, dtype):
    for bias in (True, False):
        check(problem(*CASES[case], dtype, bias), backend)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_options(backend, options, dtype):
    p = problem((6, 11), 9, 37, dtype, **OPTIONS[options])
    if not runs(backend, dtype):
        with pytest.raises(BackendError, match=f"has no kernel for {dtype}"):
            run(p, backend.name, backend.device)
        return
    check(p, backend)


def test_many_steps(backend):
    """The correction of the bias after many steps, and at a step far beyond."""
    check(problem((4, 5), 6, 20, steps=40, betas=(0.9, 0.99)), backend)
    p = problem((4, 5), 6, 20, steps=1)
    late = lambda *a, step, **options: vf.ops.sparse_adam(*a, step=10_000_000, **options)  # noqa: E731
    (_, m, v, *_), (param, *_) = run(p, backend.name), run(p, backend.name, call=late)
    expected = p.param.double() - p.options["lr"] * m.double() / (v.double().sqrt() + 1e-8)
    assert_close(param, expected.float(), expected, terms=30)


@st.composite
def any_problem(draw):
    if draw(st.booleans()):
        rows = draw(st.integers(0, 6)), draw(st.integers(0, 20))
    else:
        rows = draw(st.lists(st.integers(0, 20), max_size=6))
    shape = rows, draw(st.integers(1, 30)), draw(st.integers(0, 150))
    options = draw(st.sampled_from(list(OPTIONS.values())))
    dtype, bias, seed = draw(st.sampled_from(FLOATS)), draw(st.booleans()), draw(st.integers(0, 999))
    return problem(*shape, dtype, bias, 2, seed, **options)


@given(p=any_problem())
def test_any_problem(backend, p):
    if runs(backend, p.param.dtype):
        check(p, backend)


@one_of_each
def test_memory_layout_of_the_entries_changes_nothing(backend):
    p = problem((6, 5), 9, 20)
    expected = run(p, backend.name, backend.device)
    changes = {
        "transposed": lambda x: x.T.contiguous().T,
        "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "leading": lambda x: x.view(2, 3, -1),
        "int64": lambda x: x if x.is_floating_point() else x.long(),
    }
    for name, change in changes.items():
        changed = replace(p, steps=[(*(change(x) for x in step[:3]), None) for step in p.steps])
        results = run(changed, backend.name, backend.device)
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), name
    flat = torch.arange(0, 31, 5, dtype=torch.int32)
    lengths = replace(p, steps=[(v.flatten(), i.flatten(), g, flat) for v, i, g, _ in p.steps])
    results = run(lengths, backend.name, backend.device)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_padding_and_nan(backend):
    """Entries (0, 0) change nothing; a value that is NaN spoils its latent, and no other."""
    for width in (5, 77):
        p = problem((6, 5), 9, width, weight_decay=0.1)
        pad = torch.zeros(6, 3)
        padded = [(torch.cat([v, pad], 1), torch.cat([i, pad.int()], 1), g, o) for v, i, g, o in p.steps]
        expected = run(p, backend.name, backend.device)
        got = run(replace(p, steps=padded), backend.name, backend.device)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        p.steps[1][0][2, 3] = math.nan
        latent = int(p.steps[1][1][2, 3])
        for a, b in zip(run(p, backend.name, backend.device), expected, strict=True):
            assert bool(a[latent].isnan().all())
            a[latent] = b[latent]
            assert torch.equal(a, b)


def test_an_infinite_parameter_without_weight_decay(backend):
    """It stays, and its moments do not hear of it; as torch has it."""
    p = problem((6, 5), 9, 20)
    p.param[0, 0] = math.inf
    param, m, v, *_ = run(p, backend.name, backend.device)
    assert float(param[0, 0]) == math.inf
    assert bool(m.isfinite().all()) and bool(v.isfinite().all())


@pytest.mark.parametrize("index", [9, -1, 2**31 - 1])
def test_after_an_error_nothing_has_changed(backend, index):
    if backend.device != "cpu":
        pytest.skip("on a GPU such an entry is left out")
    for rows, place in (((5, 6), "row 3, 4"), ([10, 0, 15, 5], "entry 22")):
        p = problem(rows, 9, 20, steps=1)
        p.steps[0][1].view(-1)[22] = index
        before = [p.param.clone(), p.bias.clone()]
        state = [p.param, torch.zeros(9, 20), torch.zeros(9, 20)]
        biases = {"bias": p.bias, "bias_exp_avg": torch.zeros(9), "bias_exp_avg_sq": torch.zeros(9)}
        values, indices, g, offsets = p.steps[0]
        given = {"lr": 1, "step": 1, "offsets": offsets, **biases}
        with pytest.raises(InputError, match=rf"^indices: {place} is {index}, expected indices in \[0, 9\)$"):
            vf.ops.sparse_adam(*state, values, indices, g, **given)
        if offsets is not None:
            offsets[1] = 26
            with pytest.raises(InputError, match=r"^offsets: expected ascending numbers from 0 to N = 30, got \["):
                vf.ops.sparse_adam(*state, values, indices, g, **given)
        assert torch.equal(p.param, before[0]) and torch.equal(p.bias, before[1])
        assert not any(bool(x.any()) for x in (*state[1:], *list(biases.values())[1:]))


# --- torch around it -------------------------------------------------------------------------------------------------


@one_of_each
def test_it_has_no_gradient_and_graphs_hear_of_it(backend):
    p = problem((6, 5), 9, 20, steps=1).to(torch.float32, backend.device)
    values, indices, g, _ = p.steps[0]
    param = torch.nn.Parameter(p.param.clone())
    moments = [torch.zeros_like(p.param) for _ in range(2)]
    loss = param.square().sum()
    vf.ops.sparse_adam(param, *moments, values.requires_grad_(), indices, g.requires_grad_(), lr=0.01, step=1)
    assert param.is_leaf and param.requires_grad and param.grad is None
    assert not moments[0].requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        vf.ops.sparse_adam(torch.ones_like(p.param), *moments, values, indices, g, lr=0.01, step=1)


@one_of_each
def test_the_registered_op_passes_opcheck(backend):
    for rows, bias in (((6, 5), True), ([3, 0, 4], False)):
        p = problem(rows, 9, 20, bias=bias, steps=1).to(torch.float32, backend.device)
        state = [p.param, torch.zeros_like(p.param), torch.ones_like(p.param)]
        biases = [None] * 3 if p.bias is None else [p.bias, torch.zeros_like(p.bias), torch.ones_like(p.bias)]
        arguments = (*state, *p.steps[0], 0.01, 0.9, 0.999, 1e-8, 0.0, 3, False, *biases)
        torch.library.opcheck(OP.default, arguments)


@one_of_each
def test_compiled_without_breaks(backend):
    torch._dynamo.reset()
    compiled = torch.compile(vf.ops.sparse_adam, fullgraph=True, backend="aot_eager")
    for p in (problem((6, 5), 9, 20), problem([3, 0, 4], 9, 20, bias=False)):
        check(p, backend, run(p, backend.name, backend.device, compiled))


@one_of_each
def test_vmap_is_an_error(backend):
    p = problem((6, 5), 9, 20, steps=1).to(torch.float32, backend.device)
    values, indices, g, _ = p.steps[0]
    moments = torch.zeros(9, 20, device=backend.device)

    def step(values):
        vf.ops.sparse_adam(p.param, moments, moments.clone(), values, indices, g, lr=0.01, step=1)
        return values

    before = p.param.clone()
    with pytest.raises(InputError, match="^param: sparse_adam cannot be called under vmap"):
        torch.vmap(step)(values[None])
    assert torch.equal(p.param, before)


# --- memory and threads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["an entry dropped", "twice eps", "the step before", "one element skipped"])
def test_a_wrong_kernel_is_found(wrong, monkeypatch):
    """The checks of this file bite: planted around the real kernel, each of these makes them fail."""
    cpp, backend = ROW.cells["cpp"], CPP[-1]
    right = cpp.load()["sparse_adam"]

    def kernel(param, exp_avg, exp_avg_sq, values, indices, g, offsets, lr, beta1, beta2, eps, decay, step, *rest):
        last = float(param[-1, -1])
        if wrong == "an entry dropped":
            values = values.clone()
            values.view(-1)[-1] = 0
        if wrong == "twice eps":
            eps = eps * 2
        if wrong == "the step before":
            step = max(1, step - 1)
        right(param, exp_avg, exp_avg_sq, values, indices, g, offsets, lr, beta1, beta2, eps, decay, step, *rest)
        if wrong == "one element skipped":
            param[-1, -1] = last

    p = problem((6, 5), 4, 21, eps=1e-3)
    with backend.forced():
        check(p, backend)
        cell = _registry.Kernel(lambda: {"sparse_adam": kernel}, cpp.devices, cpp.dtypes, cpp.reason)
        monkeypatch.setitem(ROW.cells, "cpp", cell)
        with pytest.raises(AssertionError, match="element"):
            check(p, backend)


@pytest.mark.parametrize("backend", parameters(CPP))
def test_threads_and_repetition_change_no_bit(backend):
    with backend.forced():
        for dtype, rows in itertools.product(
            (torch.float32, torch.bfloat16), ((130, 45), [n % 90 for n in range(150)])
        ):
            p = problem(rows, 3500, 77, dtype)
            results = []
            for threads in (1, 2, 2):
                torch.set_num_threads(threads)
                assert _native.threads(p.param.numel()) == threads
                results.append(run(p, "cpp"))
            torch.set_num_threads(1)
            for again in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))
            check(p, backend, results[1])


EDGES = """
import torch, guarded, vaecirc_fast as vf
from vaecirc_fast import _native

torch.manual_seed(0)
names = ("bias", "bias_exp_avg", "bias_exp_avg_sq")
for name in _native.cpp().instruction_sets():
    _native.cpp().set_instruction_set(name)
    for dtype in (torch.float32, torch.bfloat16):
        for width in (1, 3, 8, 15, 16, 17, 64, 77, 150):
            for offsets in (None, torch.tensor([0, 4, 4, 15], dtype=torch.int32)):
                shape = (3, 5) if offsets is None else (15,)
                indices = torch.randint(0, 7, shape, dtype=torch.int32)
                inputs = [torch.randn(shape).to(dtype), indices, torch.randn(3, width).to(dtype), offsets]
                state = [torch.randn(7, width).abs().to(dtype) for _ in range(3)]
                biases = [torch.randn(7).abs().to(dtype) for _ in range(3)]
                for before in (False, True):
                    place = lambda x: None if x is None else guarded.placed(x, before)
                    found = []
                    for copy in (lambda x: None if x is None else x.clone(), place):
                        changed = [copy(x) for x in (*state, *biases)]
                        values, indices, g, ends = map(copy, inputs)
                        options = dict(zip(names, changed[3:]), lr=0.1, step=2, offsets=ends)
                        vf.ops.sparse_adam(*changed[:3], values, indices, g, **options)
                        found.append(changed)
                    assert all(torch.equal(a, b) for a, b in zip(*found)), (name, dtype, width, before)
print("all within bounds")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forbidden pages are made by mprotect")
def test_nothing_beside_the_tensors_is_read_or_written():
    """In memory that ends at a forbidden page, before or behind."""
    tests = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", EDGES], cwd=tests, capture_output=True, text=True, timeout=120)
    assert done.stdout == "all within bounds\n", (done.returncode, done.stderr[-2000:])


# --- bad input -------------------------------------------------------------------------------------------------------


def bad(**changes):
    """Arguments of which one is wrong; tensors by their shape."""
    shapes = dict(param=(4, 5), exp_avg=(4, 5), exp_avg_sq=(4, 5), values=(2, 3), g=(2, 5))
    arguments = {**shapes, "indices": torch.zeros(2, 3, dtype=torch.int32), "lr": 0.1, "step": 1, **changes}
    make = lambda name, x: torch.zeros(x) if isinstance(x, tuple) and name != "betas" else x  # noqa: E731
    return {name: make(name, x) for name, x in arguments.items()}


BAD = {
    "param no tensor": (bad(param=3), r"^param: expected a tensor, got int$"),
    "param of one axis": (bad(param=(4,)), r"^param: expected floating \(M, D\) with M > 0, got torch.float32 \(4,\)$"),
    "param transposed": (
        bad(param=torch.zeros(5, 4).T),
        r"^param: expected a contiguous tensor, which is changed, got",
    ),
    "moments of others": (bad(exp_avg=(4, 6)), r"^exp_avg: expected the shape of param, \(4, 5\), got \(4, 6\)$"),
    "second moments": (bad(exp_avg_sq=(5, 5)), r"^exp_avg_sq: expected the shape of param"),
    "other dtype": (bad(exp_avg=torch.zeros(4, 5).bfloat16()), r"^exp_avg: expected the dtype of param, torch.float32"),
    "other device": (bad(g=torch.zeros(2, 5, device="meta")), r"^g: expected the device of param, cpu, got meta$"),
    "indices of others": (bad(values=(2, 4)), r"^indices: expected the shape of values, \(2, 4\), got \(2, 3\)$"),
    "g of others": (bad(g=(3, 5)), r"^g: expected shape \(2, 5\), got \(3, 5\)$"),
    "g of other width": (bad(g=(2, 4)), r"^g: expected shape \(2, 5\), got \(2, 4\)$"),
    "half a bias": (bad(bias=(4,)), r"^bias, bias_exp_avg, bias_exp_avg_sq: expected all three or none, got bias$"),
    "bias of others": (
        bad(bias=(5,), bias_exp_avg=(5,), bias_exp_avg_sq=(5,)),
        r"^bias: expected shape \(4,\), got \(5,\)$",
    ),
    "lr": (bad(lr=-1.0), r"^lr: expected a number in \[0, inf\), got -1.0$"),
    "lr nan": (bad(lr=math.nan), r"^lr: expected a number in \[0, inf\), got nan$"),
    "beta": (bad(betas=(0.9, 1.0)), r"^betas\[1\]: expected a number in \[0, 1\), got 1.0$"),
    "eps": (bad(eps=-1e-8), r"^eps: expected a number in \[0, inf\), got -1e-08$"),
    "weight decay": (bad(weight_decay=-0.1), r"^weight_decay: expected a number in \[0, inf\), got -0.1$"),
    "step": (bad(step=0), r"^step: expected the number of this step, from 1, got 0$"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(name):
    arguments, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        vf.ops.sparse_adam(**arguments)
    assert "\n" not in str(caught.value)
