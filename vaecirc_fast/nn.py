"""Sparse autoencoders as modules, on the fused ops: Top-k, BatchTopK, JumpReLU, L1; and an Adam for their weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import InputError
from .ops import sparse_adam, sparse_decode, threshold_encode, topk_encode
from .ops._product import product
from .ops.sparse_decode import gather, grad_values
from .ops.topk_encode import Csr, Encoded

__all__ = ["BatchTopKSAE", "JumpReLUSAE", "L1SAE", "SparseAdam", "TopKSAE"]

DEAD_AFTER = 1_000_000  # rows without firing


class TopKOutput(NamedTuple):
    """What `TopKSAE` gives for x (..., D).

    reconstruction (..., D); loss, a scalar, the sum of `losses` with their coefficients; losses: the terms, means over
    rows; fired: int32 (M,), in how many rows each latent is selected with a value above 0; values and indices (..., K).
    """

    reconstruction: Tensor
    loss: Tensor
    losses: dict[str, Tensor]
    fired: Tensor
    values: Tensor
    indices: Tensor

    @property
    def acts(self) -> Tensor:
        """The dense activations (..., M), made when asked for; differentiable."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.fired.numel())
        return dense.scatter_add(-1, self.indices.long(), self.values)

    def csr(self) -> Csr:
        """The activations by row; entries of value 0 are among them."""
        count = self.values.shape[-1]
        rows = self.values.numel() // max(count, 1)
        offsets = torch.arange(0, (rows + 1) * count, count, dtype=torch.int32, device=self.values.device)
        return Csr(self.values.flatten(), self.indices.flatten(), offsets)


class BatchTopKOutput(NamedTuple):
    """What `BatchTopKSAE` gives in train mode; fields as in `TopKOutput`, with the codes in `codes`."""

    reconstruction: Tensor
    loss: Tensor
    losses: dict[str, Tensor]
    fired: Tensor
    codes: Csr

    @property
    def acts(self) -> Tensor:
        """The dense activations (..., M), made when asked for; differentiable."""
        values, indices, offsets = self.codes
        counts = offsets.diff().long()
        rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        dense = values.new_zeros(len(counts), self.fired.numel()).index_put((rows, indices.long()), values)
        return dense.view(*self.reconstruction.shape[:-1], self.fired.numel())

    def csr(self) -> Csr:
        """The activations by row; entries of value 0 may be among them."""
        return self.codes


class DenseOutput(NamedTuple):
    """What the thresholding autoencoders give; fields as in `TopKOutput`, with the dense activations (..., M)."""

    reconstruction: Tensor
    loss: Tensor
    losses: dict[str, Tensor]
    fired: Tensor
    acts: Tensor

    def csr(self) -> Csr:
        """The activations that are not 0, by row."""
        rows = self.acts.flatten(0, -2) if self.acts.ndim > 1 else self.acts[None]
        row, index = (rows != 0).nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=len(rows))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        return Csr(rows[row, index], index.int(), offsets)


class SparseAutoencoder(nn.Module):
    """What all of them share: y = b_dec + a w_dec with a = f((x - b_dec) w_enc' + b_enc).

    Parameters: w_enc (M, D), as nn.Linear; b_enc (M,); w_dec (M, D), rows of unit norm at the start and w_enc equal to
    it; b_dec (D,). Losses are means over rows of sums over D: "mse", the squared error of a row.
    `since_fired` (M,) counts the rows since each latent last fired in train mode; `dead` is where it is at least
    `dead_after`. all_processes: count the rows of every process of torch.distributed; all must then call alike.
    """

    since_fired: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        dead_after: int = DEAD_AFTER,
        all_processes: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, size in (("d_in", d_in), ("d_sae", d_sae), ("dead_after", dead_after)):
            _whole(name, size)
        self.d_in, self.d_sae, self.dead_after, self.all_processes = d_in, d_sae, dead_after, all_processes
        rows = torch.randn(d_sae, d_in, generator=generator)
        rows = (rows / rows.norm(dim=1, keepdim=True)).to(device, dtype)
        self.w_enc, self.b_enc = nn.Parameter(rows.clone()), nn.Parameter(rows.new_zeros(d_sae))
        self.w_dec, self.b_dec = nn.Parameter(rows), nn.Parameter(rows.new_zeros(d_in))
        self.register_buffer("since_fired", torch.zeros(d_sae, dtype=torch.int64, device=device))
        self._optimizer: SparseAdam | None = None

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_sae={self.d_sae}"

    @property
    def dead(self) -> Tensor:
        """Which latents have not fired for `dead_after` rows: bool (M,)."""
        return self.since_fired >= self.dead_after

    @torch.no_grad()
    def centre(self, x: Tensor) -> None:
        """Set b_dec to the mean of the rows of x (..., D), where training starts best."""
        self._check(x)
        self.b_dec.copy_(x.flatten(0, -2).mean(0))

    def decode(self, acts: Tensor) -> Tensor:
        """Dense activations (..., M) -> (..., D)."""
        return product(acts, self.w_dec) + self.b_dec

    def _check(self, x: Any) -> None:
        if not isinstance(x, Tensor) or x.ndim < 1 or x.shape[-1] != self.d_in:
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"x: expected (..., {self.d_in}), got {given}")

    @torch.no_grad()
    def _count(self, fired: Tensor, rows: int) -> None:
        """Update `since_fired` after a training batch."""
        if not self.training:
            return
        counts = torch.cat([fired, fired.new_full((1,), rows)])
        if self.all_processes:
            torch.distributed.all_reduce(counts)
        self.since_fired.copy_(torch.where(counts[:-1] > 0, 0, self.since_fired + counts[-1]))


class TopKSAE(SparseAutoencoder):
    """Top-k sparse autoencoder (Makhzani and Frey 2013; Gao et al. 2024, arXiv 2406.04093).

    f keeps the k largest activations of a row, after a ReLU. k: may be set at any step, 1 <= k <= k_max (k at the start
    if None). In eager mode results have k entries a row. Compiled, or captured in a CUDA graph, they have k_max, padded
    with (0, 0), and k is read from the device when the kernel runs: nothing recompiles when it changes.
    k_aux, aux_coefficient: the AuxK loss on the error of the reconstruction, decoded from the k_aux largest activations
    among dead latents; the error is a constant to it. No dead latents, no loss. k_aux = 0: without.
    Other arguments as in `SparseAutoencoder`.
    """

    k_device: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        k_max: int | None = None,
        k_aux: int = 0,
        aux_coefficient: float = 1 / 32,
        **options: Any,
    ):
        super().__init__(d_in, d_sae, **options)
        _whole("k", k)
        self.k_max = k if k_max is None else k_max
        _whole("k_max", self.k_max)
        if self.k_max > d_sae:
            raise InputError(f"k: expected at most the {d_sae} latents, got {self.k_max}")
        if isinstance(k_aux, bool) or not isinstance(k_aux, int) or not 0 <= k_aux <= d_sae:
            raise InputError(f"k_aux: expected an integer from 0 to the {d_sae} latents, got {k_aux!r}")
        self.k_aux, self.aux_coefficient = k_aux, aux_coefficient
        self.register_buffer("k_device", torch.tensor(k, dtype=torch.int32, device=self.w_enc.device))
        self.k = k
        self.register_load_state_dict_post_hook(_read_k)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self._k}, k_max={self.k_max}, k_aux={self.k_aux}"

    @property
    def k(self) -> int:
        """Active latents a row."""
        return self._k

    @k.setter
    def k(self, value: int) -> None:
        _whole("k", value)
        if value > self.k_max:
            raise InputError(f"k: expected at most k_max = {self.k_max}, got {value}; give k_max= at the start")
        self._k = value
        self.k_device.fill_(value)

    def _selection(self) -> dict[str, Any]:
        """k as the op takes it here: read from the device where a graph is kept, else a number."""
        if torch.compiler.is_compiling() or (self.w_enc.is_cuda and torch.cuda.is_current_stream_capturing()):
            return {"k": self.k_device, "k_max": self.k_max}
        return {"k": self._k}

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and indices (..., K) of x (..., D)."""
        self._check(x)
        code: Any = topk_encode(x - self.b_dec, self.w_enc, self.b_enc, **self._selection())
        return code

    def forward(self, x: Tensor) -> TopKOutput:
        """x (..., D) -> reconstruction, loss and codes."""
        self._check(x)
        aux = self.training and self.k_aux > 0
        options = {**self._selection(), **({"dead": self.dead, "k_aux": self.k_aux} if aux else {})}
        rows = x.reshape(-1, self.d_in)
        encode, decode = (_encode_deferred, _decode_deferred) if self._deferred() else (_encode, _decode)
        code: Any = encode(self, rows, options)
        y, error = decode(self, code.values, code.indices, self.b_dec, rows)
        losses = {"mse": error.sum() / max(len(rows), 1)}
        loss = losses["mse"]
        if aux:
            _, missed = decode(self, code.aux_values, code.aux_indices, None, (rows - y).detach())
            # Only where there is something to revive: an error that no latent is there to explain is no loss.
            losses["aux"] = missed.sum() / max(len(rows), 1) * options["dead"].any()
            loss = loss + self.aux_coefficient * losses["aux"]
        self._count(code.fired, len(rows))
        shape = x.shape[:-1]
        values, indices = (t.view(*shape, t.shape[-1]) for t in (code.values, code.indices))
        return TopKOutput(y.view_as(x), loss, losses, code.fired, values, indices)

    def _deferred(self) -> bool:
        """Whether weights get their gradients in `SparseAdam.step`."""
        if self._optimizer is None or not (self.training and torch.is_grad_enabled()):
            return False
        if torch.compiler.is_compiling():
            raise InputError("SparseAdam: works on eager modules; use torch.optim.Adam on a compiled one")
        return True


class BatchTopKSAE(SparseAutoencoder):
    """BatchTopK sparse autoencoder (Bussmann et al. 2024, arXiv 2412.06410).

    In train mode f keeps the k B largest activations of all B rows together, after a ReLU. `threshold` follows the
    smallest of them that is above 0, as a moving average of weight `momentum`; in eval mode f keeps what is above it,
    so that a row's codes do not depend on its neighbours. Other arguments as in `SparseAutoencoder`.
    """

    threshold: Tensor

    def __init__(self, d_in: int, d_sae: int, k: int, *, momentum: float = 0.999, **options: Any):
        super().__init__(d_in, d_sae, **options)
        if not 0 <= momentum < 1:
            raise InputError(f"momentum: expected a number in [0, 1), got {momentum}")
        self.momentum = momentum
        self.register_buffer("threshold", torch.full((), math.nan, device=self.w_enc.device))
        self.k = k

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, k={self.k}"

    @property
    def k(self) -> int:
        """Active latents a row, on average; may be set at any step."""
        return self._k

    @k.setter
    def k(self, value: int) -> None:
        _whole("k", value)
        if value > self.d_sae:
            raise InputError(f"k: expected at most the {self.d_sae} latents, got {value}")
        self._k = value

    def encode(self, x: Tensor) -> Csr | Tensor:
        """Codes of x (..., D): in train mode by row, in eval mode dense (..., M)."""
        self._check(x)
        if self.training:
            return self._codes(x)
        return threshold_encode(x - self.b_dec, self.w_enc, self.b_enc, self._limit(x))

    def _codes(self, x: Tensor) -> Csr:
        codes: Any = topk_encode(x - self.b_dec, self.w_enc, self.b_enc, self._k, scope="batch")
        return codes

    def forward(self, x: Tensor) -> BatchTopKOutput | DenseOutput:
        """x (..., D) -> reconstruction, loss and codes."""
        self._check(x)
        if not self.training:
            out = threshold_encode(x - self.b_dec, self.w_enc, self.b_enc, self._limit(x), counts=True)
            y = self.decode(out.acts)
            losses = {"mse": _mean_square(y, x)}
            return DenseOutput(y, losses["mse"], losses, out.fired, out.acts)
        codes = self._codes(x)
        rows = x.reshape(-1, self.d_in)
        y, error = sparse_decode(
            codes.values, codes.indices, self.w_dec, self.b_dec, offsets=codes.offsets, target=rows
        )
        fired = torch.zeros(self.d_sae, dtype=torch.int32, device=x.device)
        fired.index_add_(0, codes.indices.long(), (codes.values > 0).int())
        self._follow(codes.values)
        self._count(fired, len(rows))
        losses = {"mse": error.sum() / max(len(rows), 1)}
        return BatchTopKOutput(y.view_as(x), losses["mse"], losses, fired, codes)

    def _limit(self, x: Tensor) -> Tensor:
        """The threshold of eval mode; 0 before any training."""
        return self.threshold.nan_to_num(0.0).to(x.dtype)

    @torch.no_grad()
    def _follow(self, values: Tensor) -> None:
        smallest = torch.where(values > 0, values, math.inf).amin().to(self.threshold) if values.numel() else math.inf
        smallest = torch.as_tensor(smallest, device=self.threshold.device)
        mean = torch.lerp(smallest, self.threshold, self.momentum)
        mean = torch.where(self.threshold.isnan(), smallest, mean)
        self.threshold.copy_(torch.where(smallest.isinf(), self.threshold, mean))


class JumpReLUSAE(SparseAutoencoder):
    """JumpReLU sparse autoencoder (Rajamanoharan et al. 2024, arXiv 2407.14435).

    f keeps pre-activations above a learned threshold; `log_threshold` (M,) is the parameter. Loss: mse plus
    l0_coefficient times the mean number of active latents a row, whose gradient is the straight-through one with a
    rectangle of width `bandwidth`. Other arguments as in `SparseAutoencoder`.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        l0_coefficient: float = 1e-3,
        threshold: float = 1e-3,
        bandwidth: float = 1e-3,
        **options: Any,
    ):
        super().__init__(d_in, d_sae, **options)
        if not threshold > 0:
            raise InputError(f"threshold: expected a positive number, got {threshold}")
        self.l0_coefficient, self.bandwidth = l0_coefficient, bandwidth
        self.log_threshold = nn.Parameter(torch.full_like(self.b_enc, math.log(threshold)))

    @property
    def threshold(self) -> Tensor:
        """The thresholds (M,)."""
        return self.log_threshold.exp()

    def encode(self, x: Tensor) -> Tensor:
        """Dense activations (..., M) of x (..., D)."""
        self._check(x)
        centred = x - self.b_dec
        return threshold_encode(centred, self.w_enc, self.b_enc, self.threshold, "jump", bandwidth=self.bandwidth)

    def forward(self, x: Tensor) -> DenseOutput:
        """x (..., D) -> reconstruction, loss and codes."""
        self._check(x)
        out = threshold_encode(
            x - self.b_dec, self.w_enc, self.b_enc, self.threshold, "jump", bandwidth=self.bandwidth, counts=True
        )
        y = self.decode(out.acts)
        losses = {"mse": _mean_square(y, x), "l0": out.l0.sum() / max(out.l0.numel(), 1)}
        self._count(out.fired, out.l0.numel())
        return DenseOutput(y, losses["mse"] + self.l0_coefficient * losses["l0"], losses, out.fired, out.acts)


class L1SAE(SparseAutoencoder):
    """L1 sparse autoencoder (Bricken et al. 2023): f is the ReLU, and the loss has l1_coefficient times sum a.

    Rows of the decoder are scaled to unit norm wherever they are used, so that the penalty cannot be met by making
    codes small and decoder rows large. Other arguments as in `SparseAutoencoder`.
    """

    def __init__(self, d_in: int, d_sae: int, *, l1_coefficient: float = 1e-3, **options: Any):
        super().__init__(d_in, d_sae, **options)
        self.l1_coefficient = l1_coefficient

    def decode(self, acts: Tensor) -> Tensor:
        """Dense activations (..., M) -> (..., D)."""
        return product(acts, nn.functional.normalize(self.w_dec)) + self.b_dec

    def encode(self, x: Tensor) -> Tensor:
        """Dense activations (..., M) of x (..., D)."""
        self._check(x)
        return threshold_encode(x - self.b_dec, self.w_enc, self.b_enc)

    def forward(self, x: Tensor) -> DenseOutput:
        """x (..., D) -> reconstruction, loss and codes."""
        self._check(x)
        out = threshold_encode(x - self.b_dec, self.w_enc, self.b_enc, counts=True)
        y = self.decode(out.acts)
        losses = {"mse": _mean_square(y, x), "l1": out.penalty.sum() / max(out.penalty.numel(), 1)}
        self._count(out.fired, out.l0.numel())
        return DenseOutput(y, losses["mse"] + self.l1_coefficient * losses["l1"], losses, out.fired, out.acts)


def _read_k(sae: TopKSAE, _incompatible: Any) -> None:
    """After loading: the number that eager calls use is the one in the state."""
    sae.k = int(sae.k_device)


def _encode(sae: TopKSAE, rows: Tensor, options: dict[str, Any]) -> Encoded:
    code: Any = topk_encode(rows - sae.b_dec, sae.w_enc, sae.b_enc, fired=True, **options)
    return code


def _decode(sae: TopKSAE, values: Tensor, indices: Tensor, b_dec: Tensor | None, target: Tensor):
    return sparse_decode(values, indices, sae.w_dec, b_dec, target=target)


# --- the gradients of matrices, left to the optimizer ----------------------------------------------------------------


class _EncodeDeferred(torch.autograd.Function):
    """`_encode`, whose backward pass leaves what the gradients of w_enc and b_enc are made of to the optimizer."""

    @staticmethod
    def forward(ctx: Any, sae: TopKSAE, rows: Tensor, b_dec: Tensor, w_enc: Tensor, b_enc: Tensor, options: dict):
        centred = rows - b_dec
        code: Any = topk_encode(centred, w_enc, b_enc, fired=True, **options)
        ctx.sae = sae
        ctx.save_for_backward(centred, w_enc, code.values, code.indices, code.aux_values, code.aux_indices)
        ctx.mark_non_differentiable(*(t for t in (code.indices, code.fired, code.aux_indices) if t is not None))
        return tuple(code)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        grad, _, _, grad_aux, _ = grads
        centred, w_enc, values, indices, aux_values, aux_indices = ctx.saved_tensors
        grad = torch.where(values > 0, grad, 0)
        if aux_values is not None:
            grad = torch.cat([grad, torch.where(aux_values > 0, grad_aux, 0)], 1)
            indices = torch.cat([indices, aux_indices], 1)
        ctx.sae._optimizer._left["w_enc"].append((grad, indices, centred))
        if ctx.needs_input_grad[1]:
            grad_rows = gather(grad, indices, w_enc)
            return None, grad_rows, -grad_rows.sum(0), None, None, None
        of_b_enc = grad.new_zeros(len(w_enc)).index_add_(0, indices.flatten(), grad.flatten())
        return None, None, -(of_b_enc @ w_enc), None, None, None


class _DecodeDeferred(torch.autograd.Function):
    """`_decode`, whose backward pass leaves what the gradient of w_dec is made of to the optimizer."""

    @staticmethod
    def forward(ctx: Any, sae: TopKSAE, values: Tensor, indices: Tensor, w_dec: Tensor, b_dec: Tensor | None, target):
        y, error = sparse_decode(values, indices, w_dec, b_dec, target=target)
        ctx.sae, ctx.biased = sae, b_dec is not None
        ctx.save_for_backward(values, indices, w_dec, y, target)
        ctx.set_materialize_grads(False)
        return y, error

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        grad, grad_error = grads
        values, indices, w_dec, y, target = ctx.saved_tensors
        of_error = torch.zeros_like(y) if grad_error is None else 2 * grad_error[:, None] * (y - target)
        total = of_error if grad is None else grad + of_error
        ctx.sae._optimizer._left["w_dec"].append((values, indices, total))
        grad_target = -of_error if ctx.needs_input_grad[5] else None
        return None, grad_values(indices, w_dec, total), None, None, total.sum(0) if ctx.biased else None, grad_target


def _encode_deferred(sae: TopKSAE, rows: Tensor, options: dict[str, Any]) -> Encoded:
    return Encoded(*_EncodeDeferred.apply(sae, rows, sae.b_dec, sae.w_enc, sae.b_enc, options))


def _decode_deferred(sae: TopKSAE, values: Tensor, indices: Tensor, b_dec: Tensor | None, target: Tensor):
    return _DecodeDeferred.apply(sae, values, indices, sae.w_dec, b_dec, target)


class SparseAdam(torch.optim.Adam):
    """torch.optim.Adam (decoupled: AdamW) for a `TopKSAE`, which updates w_enc, b_enc and w_dec from the sparse codes.

    The gradients of these three are never formed: their `grad` stays None, so they cannot be clipped or reduced over
    processes, and `step` uses up what the backward passes since the last step have left. Every latent is updated, also
    those that no row used, as in torch.optim.Adam, whose state dict this one's is. Options of torch.optim.Adam that are
    no arguments here are not supported.
    """

    def __init__(
        self,
        sae: TopKSAE,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = False,
    ):
        if not isinstance(sae, TopKSAE):
            raise InputError(f"sae: expected a TopKSAE, got {type(sae).__name__}")
        super().__init__(sae.parameters(), lr, betas, eps, weight_decay, decoupled_weight_decay=decoupled)
        self._sae = sae
        self._left: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {"w_enc": [], "w_dec": []}
        sae._optimizer = self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, also those that were left for `step`."""
        super().zero_grad(set_to_none)
        for left in self._left.values():
            left.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; InputError where one of the three has a gradient from elsewhere too."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sae, group = self._sae, self.param_groups[0]
        for name, left in self._left.items():
            if not left:
                continue
            param, bias = getattr(sae, name), sae.b_enc if name == "w_enc" else None
            if param.grad is not None or (bias is not None and bias.grad is not None):
                raise InputError(f"{name}: has a gradient beside that of its codes; use torch.optim.Adam")
            state, of_bias = self._moments(param), self._moments(bias)
            sparse_adam(
                param,
                state["exp_avg"],
                state["exp_avg_sq"],
                **_joined(left),
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                decoupled=group["decoupled_weight_decay"],
                step=int(state["step"]),
                bias=bias,
                bias_exp_avg=of_bias.get("exp_avg"),
                bias_exp_avg_sq=of_bias.get("exp_avg_sq"),
            )
            left.clear()
        super().step()
        return loss

    def _moments(self, param: Tensor | None) -> dict[str, Any]:
        """The parameter's state, as torch.optim.Adam keeps it, one step on."""
        if param is None:
            return {}
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        state["step"] += 1
        return state


def _joined(left: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Any]:
    """The codes of several backward passes as those of one, by row."""
    if len(left) == 1:
        values, indices, g = left[0]
        return {"values": values, "indices": indices, "g": g, "offsets": None}
    values, indices = (torch.cat([entry[n].flatten() for entry in left]) for n in (0, 1))
    g = torch.cat([g for _, _, g in left])
    counts = torch.cat([torch.full((len(v),), v.shape[1], device=v.device) for v, _, _ in left])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return {"values": values, "indices": indices, "g": g, "offsets": offsets}


def _mean_square(y: Tensor, x: Tensor) -> Tensor:
    return (y - x).square().sum() / max(x.numel() // x.shape[-1], 1)


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name}: expected an integer of at least 1, got {value!r}")
