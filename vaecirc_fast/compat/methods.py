"""What the fast methods of all peers share: state kept with a module, falling back in sight, codes sparse and dense."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import ops
from ..ops._library import is_traced
from ..ops.sparse_decode import accumulate, gather

FEW = 8  # a decoder is sparse where no row has more than 1 / FEW of the latents active
DENSE_DECODER = "how many codes are active is not known beforehand, so the product stays dense"
KEY = "_vaecirc_fast"  # of the state in the module's __dict__


@dataclass(frozen=True)
class Sparse:
    """Codes as entries: values and indices (..., K), or with offsets (N,)."""

    values: Tensor
    indices: Tensor
    offsets: Tensor | None = None


@dataclass
class State:
    """What an accelerated module keeps: its class's name, what fell back and why, and its last codes."""

    of: str
    code_gradients: bool = True
    fallbacks: Counter = field(default_factory=Counter)
    quiet: bool = False  # while it is verified
    own_codes: bool = False  # within a method of the module that shows nobody the codes before it decodes them
    sparse_only: bool = False  # within a method that does not look at dense pre-activations
    last: tuple[weakref.ref, Sparse] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}


def state_of(module: nn.Module) -> State:
    return module.__dict__[KEY]


def fall_back(module: nn.Module, method: str, why: str, *args: Any, **kwargs: Any) -> Any:
    """Calls the class's own method: in sight, by a warning at the first time for each reason, and counted."""
    state = state_of(module)
    if not state.quiet:
        if not any(reason == why for _, reason in state.fallbacks):
            warnings.warn(f"{state.of}.{method} runs as its package has it: {why}", stacklevel=3)
        state.fallbacks[method, why] += 1
    return getattr(type(module), method)(module, *args, **kwargs)


@contextlib.contextmanager
def setting(module: nn.Module, **flags: bool) -> Iterator[None]:
    """State with these flags, for the length of a call."""
    state = state_of(module)
    before = {name: getattr(state, name) for name in flags}
    state.__dict__.update(flags)
    try:
        yield
    finally:
        state.__dict__.update(before)


OPS: Any = ops  # what they return depends on what is asked for, which types do not follow
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """Whether calling `module` would call something else, too."""
    return any(module.__dict__.get(name) for name in HOOKS)


def globally_hooked() -> bool:
    return any(
        getattr(torch_module, f"_global{name}", None)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


def why_dense(module: nn.Module, x: Any, points: tuple[str, ...], weight: Tensor) -> str | None:
    """Why a call must run as its package has it, or None. `points`: the submodules that a fast call does not call."""
    for name in points:
        if hooked(getattr(module, name)):
            return f"{name} has hooks"
    if globally_hooked():
        return "torch has global module hooks"
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.device != weight.device:
        return "the input is no floating tensor on the device of the weights"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    return None


def why_transformed() -> str | None:
    """Why `threshold_encode` cannot be called, or None: its gradient is no function of its own."""
    return "a torch.func transform is active" if torch._C._are_functorch_transforms_active() else None


def why_other_dtype(x: Tensor, weight: Tensor) -> str | None:
    """Why x does not fit the weights of a module that does not convert it, or None."""
    if x.dtype != weight.dtype:
        return f"the input is {x.dtype} and the weights are {weight.dtype}"
    return None


def plain_linear(module: nn.Module, *names: str) -> str | None:
    """Why not all of these submodules are what their package made, an nn.Linear, or None."""
    for name in names:
        layer = getattr(module, name)
        if type(layer) is not nn.Linear or "forward" in layer.__dict__:
            return f"{name} was replaced by {type(layer).__name__}"
    return None


def dense(values: Tensor, indices: Tensor, latents: int) -> Tensor:
    """(..., K) entries, no index twice, as (..., latents). Differentiable."""
    if torch._C._are_functorch_transforms_active():
        return values.new_zeros(*values.shape[:-1], latents).scatter(-1, indices.long(), values)
    rows = values.reshape(-1, values.shape[-1]), indices.reshape(-1, values.shape[-1])
    return torch.ops.vaecirc_fast.topk_backward(*rows, None, latents).view(*values.shape[:-1], latents)


def dense_csr(sparse: Sparse, shape: torch.Size, latents: int) -> Tensor:
    """Entries with offsets as (*shape, latents). Differentiable."""
    assert sparse.offsets is not None
    counts = sparse.offsets.diff().long()
    rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    flat = sparse.values.new_zeros(len(counts) * latents)
    return flat.scatter(0, rows * latents + sparse.indices, sparse.values).view(*shape, latents)


def _readable(t: Tensor) -> bool:
    """Whether the numbers can be looked at now: on a CPU, and neither compiling nor under a transform."""
    return t.device.type == "cpu" and not is_traced(t) and not torch._C._are_functorch_transforms_active()


def remember(module: nn.Module, codes: Tensor, sparse: Sparse) -> Tensor:
    """Returns `codes`, of which `decode` will know the sparse form if it is given this very tensor."""
    if not _readable(codes) or not codes.is_contiguous():
        return codes
    state = state_of(module)

    def forget(gone: weakref.ref) -> None:  # the graph of the sparse form dies with the dense one's
        if state.last is not None and state.last[0] is gone:
            state.last = None

    state.last = weakref.ref(codes, forget), sparse
    return codes


def _bits(t: Tensor) -> Tensor:
    """The memory of a contiguous tensor as the widest integers that it holds a whole number of."""
    wide = t.numel() * t.element_size() % 8 == 0
    narrow = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().view(-1).view(torch.int64 if wide else narrow)


def recall(module: nn.Module, codes: Any) -> Sparse | None:
    """The sparse form of dense codes that `encode` has just made, if they are still what they were, to the bit.

    None where a gradient may be asked for with respect to the codes: it is not sparse. On a GPU nobody waits to look.
    """
    state = state_of(module)
    if state.last is None or state.last[0]() is not codes or not _readable(codes):
        return None
    sparse = state.last[1]
    if torch.is_grad_enabled() and codes.requires_grad and state.code_gradients and not state.own_codes:
        return None
    # Whoever writes through .data, or numpy, leaves no trace but the numbers.
    latents = codes.shape[-1]
    with torch.no_grad():
        if sparse.offsets is None:
            again = dense(sparse.values, sparse.indices, latents)
        else:
            again = dense_csr(sparse, codes.shape[:-1], latents)
        same = torch.equal(_bits(again), _bits(codes))
    return sparse if same else None


def thresholded(given: Tensor, w: Tensor, b: Tensor | None, threshold: float | Tensor, kind: str, **how: Any):
    """`threshold_encode` for a decoder that follows at once: the entries that are active, padded to the row with the
    most, if these are few; else the dense codes. On a GPU nobody waits to look."""
    found = OPS.threshold_encode(given, w, b, threshold, kind, counts=True, **how)
    if not _readable(found.l0) or found.l0.numel() == 0:
        return found.acts
    if kind == "jump":  # inactive codes near the threshold have a gradient; and below 0 some are active
        if torch.is_grad_enabled() or bool((torch.as_tensor(threshold) < 0).any()):
            return found.acts
    most = max(1, int(found.l0.max()))
    return Sparse(*ops.topk(found.acts, most)) if most * FEW <= w.shape[0] else found.acts


class _Selected(torch.autograd.Function):
    """The k largest of relu(pre), pre = x w' + b at hand, with the sparse gradients of x, w and b."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = ops.topk(pre, k)
        values = values.relu()
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(x, w, values, indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        x, w, values, indices = ctx.saved_tensors
        grad = torch.where(values > 0, grads[0], 0)
        grad_x = gather(grad, indices, w) if ctx.needs_input_grad[1] else None
        grad_w, grad_b = accumulate(grad, indices, x, w.shape[0])
        return None, grad_x, grad_w, grad_b, None


def selected(pre: Tensor, x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices (..., k) of the k largest of relu(pre), where pre (..., M) = x w' + b was needed for more.

    The gradient goes to x, w and b as the sums over entries that it is, and not through pre.
    """
    if torch._C._are_functorch_transforms_active():
        values, indices = ops.topk(pre, k)
        return values.relu(), indices
    shape = (*pre.shape[:-1], k)
    rows = pre.detach().reshape(-1, pre.shape[-1]), x.reshape(-1, x.shape[-1])
    values, indices = _Selected.apply(*rows, w, b, k)
    return values.view(shape), indices.view(shape)


# --- what a peer's file says about a module --------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """What makes a latent active: being among the k largest of its row or, with `batch`, among the k a row of all rows;
    or, where k is None, being above a threshold."""

    k: int | None = None
    batch: bool = False
    threshold: Tensor | float = 0.0
    relu: bool = True


@dataclass(frozen=True)
class Check:
    """Something to compare before and after: a dense result of `call(module, x)`."""

    name: str
    call: Callable[[Any, Tensor], Tensor]
    codes: str  # the name of the check whose active latents it depends on: its own, if it is codes itself


@dataclass(frozen=True)
class Plan:
    """What is replaced on a module of a peer, what is not and why, and how the equality of it is checked."""

    distribution: str
    width: int
    latents: int
    weight: Tensor
    methods: dict[str, tuple[Callable[..., Any], tuple[str, ...]]]  # name -> function, ops
    left: dict[str, str]  # what stays as it is -> why
    linear: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor | None]]  # x -> input of the product, w (M, D), b
    cuts: dict[str, Cut]  # name of the check of codes -> what makes a latent active
    checks: list[Check]
    points: tuple[str, ...]  # submodules that the fast methods do not call
    parts: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = field(
        default_factory=dict
    )  # submodule -> its forward
    differs: dict[str, str] = field(default_factory=dict)  # what is not the package's, for the package is wrong -> how
    sample_shape: tuple[int, ...] | None = None  # of a row, None: it cannot be known
