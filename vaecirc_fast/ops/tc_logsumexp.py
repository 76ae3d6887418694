"""Op `tc_logsumexp`: log densities of codes under a minibatch's aggregate posterior, for beta-TCVAE."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _native, _registry
from ..errors import InputError
from ..reference import tc_logsumexp as reference
from ._library import LIBRARY, is_plain_call, is_traced, one_by_one

KINDS = ("mws", "mss")


def tc_logsumexp(
    z: Tensor, mu: Tensor, logvar: Tensor, *, kind: str = "mws", dataset_size: int
) -> tuple[Tensor, Tensor]:
    """Estimates of log q(z_b) and of every log q(z_bl), q the aggregate posterior of `dataset_size` samples.

    z: (B, L) codes; mu, logvar: (M, L) means and log variances of the posteriors of a minibatch of M samples. float32
    or float64, all alike, on one device. dataset_size: N, the samples that minibatches are drawn from.
    kind: the weights w of log sum over m of w_bm N(z_b; mu_m, exp(logvar_m)):
    "mws": 1 / (N M) for all (minibatch weighted sampling, as published; what it estimates is lower than log q).
    "mss": 1 / N for m = b, else (N - 1) / (N (M - 1)) (minibatch stratified sampling): for M samples drawn without
    replacement and z_b from posterior b, the sum's mean over minibatches is q(z_b); of M = N, it is q(z_b) itself, for
    any z. Its logarithm is not unbiased. z are of the first B samples: B <= M <= N, or M = N.

    Returns log q(z) (B,) and log q(z_l) (B, L), in nats: KL to the product of marginals, the total correlation, is the
    mean of the first less the sum of the second. Differentiable in z, mu and logvar; B M L exponentials and memory of
    O((B + M) L), forward and backward. NaN spoils the results that it enters; a density that is 0 everywhere has
    logarithm -inf and gradient 0. InputError for wrong shapes, dtypes, devices or sizes.

    Source: Chen et al. 2018 (arXiv 1802.04942), equation 4 and appendix C.2; docs/definitions.md on the weights.
    """
    _check(z, mu, logvar)
    if isinstance(dataset_size, bool) or not isinstance(dataset_size, int) or dataset_size < 1:
        raise InputError(f"dataset_size: expected a whole number >= 1, got {dataset_size!r}")
    log_own, log_other = _log_weights(kind, len(z), len(mu), dataset_size)
    tensors = (z, mu, logvar)
    if is_traced(*tensors):
        return torch.ops.vaecirc_fast.tc_logsumexp(*tensors, log_own, log_other)
    return (_run if is_plain_call(*tensors) else _Function.apply)(*tensors, log_own, log_other)


def _check(z: Tensor, mu: Tensor, logvar: Tensor) -> None:
    given = {"z": z, "mu": mu, "logvar": logvar}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) or tensor.ndim != 2:
            what = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"{name}: expected a tensor of two dimensions, got {what}")
    if not z.shape[1]:
        raise InputError("z: expected at least one latent, got none")
    if not len(mu):
        raise InputError("mu: expected at least one posterior, got none")
    if mu.shape[1] != z.shape[1]:
        raise InputError(f"mu: expected {z.shape[1]} latents, as z has, got {mu.shape[1]}")
    if logvar.shape != mu.shape:
        raise InputError(f"logvar: expected shape {tuple(mu.shape)}, as mu has, got {tuple(logvar.shape)}")
    if len({tensor.dtype for tensor in given.values()}) > 1 or z.dtype not in _FLOATS:
        found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in given.items())
        raise InputError(f"z, mu, logvar: expected one dtype, float32 or float64, got {found}")
    if len({tensor.device for tensor in given.values()}) > 1:
        found = ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        raise InputError(f"z, mu, logvar: expected one device, got {found}")


def _log_weights(kind: str, B: int, M: int, N: int) -> tuple[float, float]:
    """Logarithms of the weights of posterior b for code b, and of all others."""
    if kind not in KINDS:
        raise InputError(f"kind: {kind!r} is unknown; known: {', '.join(KINDS)}")
    if kind == "mws":
        return -math.log(N) - math.log(M), -math.log(N) - math.log(M)
    if M > N:
        raise InputError(f"dataset_size: expected at least the {M} samples of the minibatch, got {N}")
    if M == N:
        return -math.log(N), -math.log(N)
    if M < B:
        raise InputError(f'mu: "mss" expected the posteriors of all {B} codes, got {M}')
    if M == 1:
        raise InputError('mu: "mss" expected at least two posteriors (or the whole data set), got one')
    return -math.log(N), math.log(N - 1) - math.log(N) - math.log(M - 1)


def _run(z: Tensor, mu: Tensor, logvar: Tensor, log_own: float, log_other: float) -> tuple[Tensor, Tensor]:
    return ROW.function("tc_logsumexp", z)(z, mu, logvar, log_own, log_other)


def _run_backward(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return ROW.function("tc_logsumexp_backward", z)(z, *rest)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    z, mu, logvar, ctx.log_own, ctx.log_other = inputs
    ctx.save_for_backward(z, mu, logvar, *output)
    ctx.forced = _registry.forced()


def _backward(ctx: Any, *grads: Tensor):
    saved = ctx.saved_tensors
    with _registry.backend(ctx.forced) if ctx.forced else contextlib.nullcontext():
        traced = is_traced(*grads, *saved)
        call = torch.ops.vaecirc_fast.tc_logsumexp_backward if traced else _BackwardFunction.apply
        return *call(*saved, *grads, ctx.log_own, ctx.log_other), None, None


class _Function(torch.autograd.Function):
    """The eager path with gradient or under a transform."""

    forward = staticmethod(_run)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any):
        return one_by_one(_Function.apply, info, in_dims, *arguments)


class _BackwardFunction(torch.autograd.Function):
    """The gradient as a function of its own, so that it too can be transformed; it has no second derivative."""

    forward = staticmethod(_run_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *arguments: Any):
        return one_by_one(_BackwardFunction.apply, info, in_dims, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        raise NotImplementedError(
            "tc_logsumexp has no second derivative; differentiate vaecirc_fast.reference.tc_logsumexp.forward"
        )


LIBRARY.define("tc_logsumexp(Tensor z, Tensor mu, Tensor logvar, float log_own, float log_other) -> (Tensor, Tensor)")
LIBRARY.define(
    "tc_logsumexp_backward(Tensor z, Tensor mu, Tensor logvar, Tensor joint, Tensor marginals, Tensor grad_joint, "
    "Tensor grad_marginals, float log_own, float log_other) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.impl("tc_logsumexp", _run, "CompositeExplicitAutograd")
LIBRARY.impl("tc_logsumexp_backward", _run_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("vaecirc_fast::tc_logsumexp", lib=LIBRARY)
def _fake(z, mu, logvar, log_own, log_other):
    return z.new_empty(z.shape[:1]), z.new_empty(z.shape)


@torch.library.register_fake("vaecirc_fast::tc_logsumexp_backward", lib=LIBRARY)
def _fake_backward(z, mu, logvar, *rest):
    return z.new_empty(z.shape), mu.new_empty(mu.shape), mu.new_empty(mu.shape)


torch.library.register_autograd("vaecirc_fast::tc_logsumexp", _backward, setup_context=_setup_context, lib=LIBRARY)
for _name in ("tc_logsumexp", "tc_logsumexp_backward"):
    torch.library.register_vmap(
        f"vaecirc_fast::{_name}", partial(one_by_one, getattr(torch.ops.vaecirc_fast, _name)), lib=LIBRARY
    )


# --- C++ -------------------------------------------------------------------------------------------------------------

_K = math.sqrt(0.5 / math.log(2))  # densities are powers of two there


def _problem(z: Tensor, mu: Tensor, logvar: Tensor, log_own: float, log_other: float) -> tuple[tuple, list[Tensor]]:
    """What the kernels are given, laid out as csrc/cpu/tc_logsumexp.h says, and what must outlive the call."""
    (M, L), B = mu.shape, len(z)
    stride = -(-M // 16) * 16
    tables = torch.zeros(3, L, stride, dtype=z.dtype)
    tables[2].fill_(-torch.inf)
    tables[0, :, :M] = mu.T
    tables[1, :, :M] = torch.exp(-logvar.T / 2).clamp(max=torch.finfo(z.dtype).max) * _K
    tables[2, :, :M] = (logvar.T + math.log(2 * math.pi)) * (-0.5 / math.log(2))
    z = z.contiguous()
    weights = (log_own / math.log(2), log_other / math.log(2))
    given = (_native.DTYPES[z.dtype], z.data_ptr(), *(t.data_ptr() for t in tables), (B, M, L, stride), weights)
    return (*given, _native.threads(B * M * L)), [z, tables]


@torch.no_grad()
def _cpp(z: Tensor, mu: Tensor, logvar: Tensor, log_own: float, log_other: float) -> tuple[Tensor, Tensor]:
    given, _kept = _problem(z, mu, logvar, log_own, log_other)
    joint, marginals = torch.empty(len(z), dtype=z.dtype), torch.empty(z.shape, dtype=z.dtype)
    _native.cpp().tc_logsumexp(given, joint.data_ptr(), marginals.data_ptr())
    return joint, marginals


@torch.no_grad()
def _cpp_backward(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    joint: Tensor,
    marginals: Tensor,
    grad_joint: Tensor,
    grad_marginals: Tensor,
    log_own: float,
    log_other: float,
) -> tuple[Tensor, Tensor, Tensor]:
    given, (_, tables) = _problem(z, mu, logvar, log_own, log_other)
    read = [t.contiguous() for t in (joint, marginals, grad_joint, grad_marginals)]
    grad_z, of_parameters = torch.empty(z.shape, dtype=z.dtype), torch.empty(2, *tables.shape[1:], dtype=z.dtype)
    written = (grad_z, *of_parameters)
    _native.cpp().tc_logsumexp_backward(given, [t.data_ptr() for t in read], [t.data_ptr() for t in written])
    grad_mu, grad_logvar = (table[:, : len(mu)].T.contiguous() for table in of_parameters)
    return grad_z, grad_mu, grad_logvar


def _load_reference():
    return {"tc_logsumexp": reference.forward, "tc_logsumexp_backward": reference.backward}


def _load_cpp():
    return {"tc_logsumexp": _cpp, "tc_logsumexp_backward": _cpp_backward}


def _load_triton():
    from ..triton_kernels import tc_logsumexp as kernels  # pyright: ignore[reportMissingImports]

    return {"tc_logsumexp": kernels.forward, "tc_logsumexp_backward": kernels.backward}


_FLOATS = (torch.float32, torch.float64)
ROW = _registry.Row(
    "tc_logsumexp",
    cells={
        "reference": _registry.Kernel(_load_reference, ("cpu", "cuda"), _FLOATS, _registry.always),
        "cpp": _registry.Kernel(_load_cpp, ("cpu",), _FLOATS, _registry.cpp_reason),
        "triton": _registry.Kernel(_load_triton, ("cpu", "cuda"), (torch.float32,), _registry.triton_reason),
        "cuda": _registry.Absent("is left to Triton: exponentials and sums in registers, which its compiler schedules"),
    },
    order={"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
)
