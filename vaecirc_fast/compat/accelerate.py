"""`accelerate`: makes a sparse autoencoder of another package fast in place, and shows on a batch that it is equal."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from .. import _registry
from ..errors import AccelerationError, InputError
from . import dictionary_learning, openai, sae_lens, sparsify
from .methods import HOOKS, KEY, Check, Cut, Plan, State

PEERS = (sae_lens, dictionary_learning, sparsify, openai)
ROWS = 64  # of a sample that is drawn
# What a subclass must not change: what is replaced, and what that does not call.
METHODS = ("forward", "encode", "decode", "encode_with_hidden_pre", "training_forward_pass", "encode_pre_act")
SCALES = (1.0, 10.0, 100.0, 1000.0)  # of its numbers: the first at which a latent is active


@dataclass(frozen=True)
class Agreement:
    """How equal a result is: its error and the original's against the original in float64, each the largest over rows
    of a difference by the row's largest magnitude; what was allowed; rows compared, and rows left out for a tie."""

    name: str
    error: float
    original: float
    allowed: float
    rows: int
    ties: int
    sets: float | None  # of codes: the part of entries whose being active or not is the original's


@dataclass
class Report:
    """What `accelerate` replaced in a module, by what, how equal the results are, and what was left alone and why."""

    of: str
    package: str
    replaced: dict[str, tuple[str, ...]]
    backends: dict[str, str]
    left: dict[str, str]
    differs: dict[str, str]
    agreements: list[Agreement]
    _state: State = field(repr=False)
    _bound: list[tuple[nn.Module, str]] = field(repr=False)

    @property
    def fallbacks(self) -> Counter:
        """(method, reason) -> calls that ran as the package has it."""
        return self._state.fallbacks

    def restore(self) -> None:
        """Makes the module what it was. Twice is as once."""
        for module, name in self._bound:
            module.__dict__.pop(name, None)
        self._bound.clear()

    def __str__(self) -> str:
        lines = [f"{self.of} of {self.package}" + ("" if self._bound else " (restored)")]
        for name, ops in self.replaced.items():
            lines.append(f"  replaced {name}: " + ", ".join(f"{op} ({self.backends[op]})" for op in ops))
        for a in self.agreements:
            sets = "" if a.sets is None else f", active latents equal in {a.sets:.6%} of entries"
            ties = f", {a.ties} rows with ties left out" if a.ties else ""
            lines.append(
                f"  {a.name}: error {a.error:.2g} of a row's largest, the original's {a.original:.2g}, "
                f"allowed {a.allowed:.2g}{sets}; {a.rows} rows{ties}"
            )
        lines += [f"  left alone: {name}: {why}" for name, why in self.left.items()]
        lines += [f"  differs from the package: {name}: {how}" for name, how in self.differs.items()]
        lines += [f"  fell back {count} times: {name}: {why}" for (name, why), count in self.fallbacks.items()]
        return "\n".join(lines)


def accelerate(module: nn.Module, *, sample: Tensor | None = None, code_gradients: bool = True) -> Report:
    """Replaces the hot path of a sparse autoencoder of SAELens, dictionary_learning, sparsify or OpenAI in place.

    module: one of the classes that the InputError for any other lists. Class, parameters, state_dict, hooks and the
    meaning of every method stay; encoders and decoders run on `vf.ops`, bound to the instance. A call that needs what
    the fast path does not make (a hook on dense pre-activations, autocast) runs as the package has it, with a warning
    at the first time and counted in `report.fallbacks`.
    sample: (..., D), a batch to compare on before and after; by default 64 normal rows from a fixed seed.
    code_gradients: whether `decode(encode(x))`, called one after the other under autograd, has the gradient of dense
    codes, which takes the dense product; with False it is decoded sparsely and only what is upstream and the weights
    get their gradients, which are the same.

    Results and sets of active latents must agree: a result's error against the original in float64 may be twice the
    original's and a few roundings, and a latent may be active in one alone only if it is tied with the cut in float64,
    up to rounding. Otherwise the module is restored and AccelerationError says the numbers.

    Returns a `Report`; print it; `report.restore()` undoes it. InputError for a module that is not known, is
    accelerated already or was patched on the instance, and for a sample of another width, with no active latent, or on
    which the module itself fails.
    """
    plan = _plan(module)
    backends = _backends(plan)
    state = State(type(module).__name__, code_gradients)
    bound: list[tuple[nn.Module, str]] = []
    with _without_hooks(module):
        before = _before(module, plan, sample)
        _bind(module, plan, state, bound)
        report = Report(
            type(module).__name__,
            _version(plan.distribution),
            {name: ops for name, (_, ops) in [*plan.methods.items(), *_parts_by_name(plan).items()]},
            backends,
            plan.left,
            plan.differs,
            [],
            state,
            bound,
        )
        try:
            state.quiet = True
            _compare(module, plan, before, report.agreements)
            state.quiet = False
        except BaseException:
            report.restore()
            raise
    state.last = None
    return report


# --- finding ---------------------------------------------------------------------------------------------------------


def _plan(module: Any) -> Plan:
    if not isinstance(module, nn.Module):
        raise InputError(f"module: expected a sparse autoencoder, got {type(module).__name__}")
    if KEY in module.__dict__:
        raise InputError("module: is accelerated already; call restore() of its report first")
    makers = {}
    for peer in PEERS:
        for (where, name), make in peer.CLASSES.items():
            makers[getattr(sys.modules.get(where), name, None)] = make  # what is not imported has no instances
    for known in type(module).__mro__:
        if known in makers:
            plan = makers[known](module)
            _check_methods(module, known, plan)
            return plan
    supported = "; ".join(f"{peer.PACKAGE}: {', '.join(name for _, name in peer.CLASSES)}" for peer in PEERS)
    raise InputError(f"module: {type(module).__module__}.{type(module).__name__} is not known; known: {supported}")


def _check_methods(module: nn.Module, known: type, plan: Plan) -> None:
    """InputError where a subclass or the instance has its own of what would be replaced, or of what that calls."""
    for name in dict.fromkeys((*plan.methods, *METHODS)):
        if name in module.__dict__:
            raise InputError(f"module: {name} was replaced on this instance, so the fast one would undo that")
        if getattr(type(module), name, None) is not getattr(known, name, None):
            raise InputError(
                f"module: {type(module).__name__} has its own {name}, and {known.__name__} is what is known"
            )
    for name in plan.parts:
        if "forward" in getattr(module, name).__dict__:
            raise InputError(f"module: {name}.forward was replaced on this instance, so the fast one would undo that")


def _parts_by_name(plan: Plan) -> dict[str, tuple[Any, tuple[str, ...]]]:
    return {f"{name}.forward": value for name, value in plan.parts.items()}


def _backends(plan: Plan) -> dict[str, str]:
    names = {op for _, ops in [*plan.methods.values(), *plan.parts.values()] for op in ops}
    return {name: _registry.rows[name].choose(plan.weight.device.type, plan.weight.dtype) for name in names}


def _version(distribution: str) -> str:
    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return distribution


def _bind(module: nn.Module, plan: Plan, state: State, bound: list[tuple[nn.Module, str]]) -> None:
    def put(target: nn.Module, name: str, value: Any) -> None:
        target.__dict__[name] = value
        bound.append((target, name))

    put(module, KEY, state)
    # Partial functions of functions with a name, not methods: a copy of the module, or a pickled one, has its own.
    for name, (function, _) in plan.methods.items():
        put(module, name, functools.partial(function, module))
    for name, (function, _) in plan.parts.items():
        part = getattr(module, name)
        put(part, KEY, state)
        put(part, "forward", functools.partial(function, part))


# --- comparing -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """A module whose hooks see nothing of what happens within."""
    kept = [(m, name, m.__dict__[name]) for m in module.modules() for name in HOOKS if m.__dict__.get(name)]
    for m, name, hooks in kept:
        m.__dict__[name] = type(hooks)()
    try:
        yield
    finally:
        for m, name, hooks in kept:
            m.__dict__[name] = hooks


class _Calling(nn.Module):
    """Calls any function of a module by `forward`, as functional_call wants it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, call: Any, x: Tensor) -> Any:
        return call(self.module, x)


def _call(module: nn.Module, call: Any, x: Tensor, dtype: torch.dtype | None = None) -> Any:
    """call(module, x) with copies of all buffers, so that none changes, and with all floats in `dtype`."""
    calling = _Calling(module)
    tensors: dict[str, Tensor] = {}
    for path, part in calling.named_modules():
        for name, tensor in part._parameters.items():
            if tensor is not None and dtype is not None:
                tensors[f"{path}.{name}"] = tensor.detach().to(dtype)
        for name, tensor in part._buffers.items():
            if tensor is not None:
                tensors[f"{path}.{name}"] = tensor.to(dtype if tensor.is_floating_point() else None, copy=True)
    if dtype is not None:
        x = x.to(dtype)
    own = module.__dict__.get("dtype")
    if dtype is not None and isinstance(own, torch.dtype):
        module.__dict__["dtype"] = dtype
    try:
        with torch.no_grad():
            # Not tie_weights: of a module that is part of two others it would leave the copies behind.
            return torch.func.functional_call(calling, tensors, (call, x), tie_weights=False)
    finally:
        if isinstance(own, torch.dtype):
            module.__dict__["dtype"] = own


@dataclass
class _Before:
    """The original's results on a sample, in float64 and in its own dtype; and how far each latent is from its cut."""

    x: Tensor
    truth: dict[str, Tensor]
    original: dict[str, Tensor]
    tied: dict[str, Tensor]


def _before(module: nn.Module, plan: Plan, sample: Tensor | None) -> _Before:
    if sample is not None:
        if not isinstance(sample, Tensor) or not sample.is_floating_point():
            raise InputError("sample: expected a floating tensor (..., D)")
        shape = plan.sample_shape
        if sample.ndim < 2 or (shape is not None and sample.shape[-len(shape) :] != shape) or sample.numel() == 0:
            expected = "(B, ..., heads, d)" if shape is None else f"(B, ..., {shape[0]})"
            raise InputError(f"sample: expected {expected} with B > 0, got {tuple(sample.shape)}")
        samples = [sample.to(plan.weight.device, plan.weight.dtype)]
    elif plan.sample_shape is None:
        raise InputError("sample: give one; how this module splits its input cannot be known")
    else:
        normal = torch.randn(ROWS, *plan.sample_shape, generator=torch.Generator().manual_seed(0))
        samples = [(scale * normal).to(plan.weight.device, plan.weight.dtype) for scale in SCALES]
    for x in samples:
        try:
            truth = {check.name: _call(module, check.call, x, torch.float64) for check in plan.checks}
        except Exception as error:
            why = str(error).partition("\n")[0]
            raise InputError(f"sample: the module's own code fails on it ({type(error).__name__}: {why})") from error
        if any(bool((truth[name] != 0).any()) for name in plan.cuts):
            break
    else:
        raise InputError("sample: no latent is active in it, so nothing could be compared; give a batch of real inputs")
    original = {check.name: _call(module, check.call, x) for check in plan.checks}
    tied = {name: _ties(module, plan, cut, x) for name, cut in plan.cuts.items()}
    return _Before(x, truth, original, tied)


def _ties(module: nn.Module, plan: Plan, cut: Cut, x: Tensor) -> Tensor:
    """(rows, M) bool: latents whose pre-activation in float64 is the cut's, up to rounding."""
    given, w, b = _call(module, plan.linear, x, torch.float64)
    given = given.reshape(-1, given.shape[-1])
    b = torch.zeros_like(w[:, 0]) if b is None else b
    pre = given @ w.T + b
    at = pre.relu() if cut.relu else pre
    if cut.k is None:
        limit = torch.as_tensor(cut.threshold, dtype=torch.float64, device=x.device).clamp(
            min=0 if cut.relu else -math.inf
        )
    elif cut.batch:
        limit = at.flatten().topk(cut.k * len(at)).values[-1]
    else:
        limit = at.topk(cut.k).values[:, -1:]
    # Weights may be scaled, inputs shifted and results rounded to the dtype, each once; sums are of float32 or better.
    eps, of_sums = torch.finfo(x.dtype).eps, torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    rounding = eps * (pre.abs() + b.abs() + (given.square() @ w.square().T).sqrt())
    rounding += (2 + math.sqrt(w.shape[1])) * of_sums * (given.abs() @ w.abs().T + b.abs())
    return (pre - limit).abs() <= 8 * rounding


def _compare(module: nn.Module, plan: Plan, before: _Before, agreements: list[Agreement]) -> None:
    """AccelerationError unless what the module gives now agrees with what it gave."""
    ours = {check.name: _call(module, check.call, before.x) for check in plan.checks}
    for name, result in ours.items():
        was = before.original[name]
        if result.shape != was.shape or result.dtype != was.dtype:
            got, expected = (f"{t.dtype} {tuple(t.shape)}" for t in (result, was))
            raise AccelerationError(f"{name}: got {got} in place of {expected}; the module was restored")
    sets = {name: _sets(name, before, ours[name]) for name in plan.cuts}
    for check in plan.checks:
        rows, part = sets[check.codes]
        active = int((_rows(before.truth[check.codes]) != 0).sum(1).max())
        terms = max(active, plan.weight.numel() // plan.latents)
        agreements.append(_agreement(check, before, ours[check.name], rows, part, terms))


def _sets(name: str, before: _Before, ours: Tensor) -> tuple[Tensor, float]:
    """(rows,) bool: rows in which all three have the same active latents; and in what part of entries two have.

    AccelerationError where the accelerated module and its original differ in a latent that is not tied.
    """
    truth, original, ours = (_rows(t) != 0 for t in (before.truth[name], before.original[name], ours))
    wrong = (ours != original) & ~before.tied[name]
    if bool(wrong.any()):
        row, latent = (int(i) for i in wrong.nonzero()[0])
        raise AccelerationError(
            f"{name}: latent {latent} of row {row} is active in {'ours' if ours[row, latent] else 'the original'} "
            f"only and is no tie ({int(wrong.sum())} such entries of {wrong.numel()}); the module was restored"
        )
    return ((ours == truth) & (original == truth)).all(1), float((ours == original).double().mean())


def _agreement(check: Check, before: _Before, ours: Tensor, rows: Tensor, sets: float, terms: int) -> Agreement:
    """AccelerationError where the error is larger than the rule allows; `terms`: the longest sum on the way."""
    truth, original = before.truth[check.name], before.original[check.name]
    if not bool(rows.any()):
        raise InputError(f"sample: every row of its {check.name} has a tie, so nothing could be compared; give another")
    error, theirs = (_error(t, truth, rows) for t in (ours, original))
    # Numbers that are added in any order drift apart by about the root of how many they are.
    of_sums = math.sqrt(terms) * torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps
    allowed = 2 * theirs + 2 * torch.finfo(ours.dtype).eps + of_sums
    if not error <= allowed:
        raise AccelerationError(
            f"{check.name}: error {error:.3g} of a row's largest; the original has {theirs:.3g}, and {allowed:.3g} is "
            "allowed; the module was restored"
        )
    ties = int((~rows).sum())
    return Agreement(
        check.name, error, theirs, allowed, len(rows) - ties, ties, sets if check.codes == check.name else None
    )


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _error(result: Tensor, truth: Tensor, rows: Tensor) -> float:
    """The largest difference by the row's largest magnitude; NaN where one is not finite and the other is."""
    result, truth = result.double().reshape(len(rows), -1)[rows], truth.reshape(len(rows), -1)[rows]
    same = (result == truth) | (result.isnan() & truth.isnan())
    largest = (
        torch.where(truth.isfinite(), truth.abs(), 0).amax(1, keepdim=True).clamp(min=torch.finfo(truth.dtype).tiny)
    )
    return float(torch.where(same, 0, (result - truth).abs() / largest).max())
