"""Recognises a decoder's layers from the operations that one call of it executes."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..errors import InputError
from ..ops.latent_sweep import Dense, Network, TransposedConvolution

aten = torch.ops.aten
Layer = Dense | TransposedConvolution

ACTIVATIONS = {
    aten.relu.default: "relu",
    aten.relu_.default: "relu",
    aten.leaky_relu.default: "leaky_relu",
    aten.leaky_relu_.default: "leaky_relu",
    aten.elu.default: "elu",
    aten.elu_.default: "elu",
    aten.sigmoid.default: "sigmoid",
    aten.sigmoid_.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.tanh_.default: "tanh",
    aten.silu.default: "silu",
    aten.silu_.default: "silu",
}
# What leaves the elements of a row as they are and in their order.
RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
_SPLITS = (aten.split_with_sizes.default, aten.split.Tensor)
_NORMS = (aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default)


@dataclass(frozen=True)
class Recorded:
    """What one row's call showed: its output (1, ...), the bytes of activations it made, the network it is, or None
    and the reason why it is none that the kernels know."""

    output: Any
    bytes: int
    network: Network | None
    reason: str


@torch.no_grad()
def record(call: Callable[[Tensor], Any], row: Tensor, images: bool = False) -> Recorded:
    """Call a decoder on `row` (1, L) and read its layers off the operations it executes.

    images: the first layer may be a transposed convolution too, and the row an image (1, C, H, W).

    Nothing is assumed of the module's code: only the operations count. A network is recognised where they are one
    chain of linear layers, then transposed convolutions (or convolutions of stride 1), the activations of the op
    `latent_sweep`, batch norm in eval mode (folded into the layer before it), reshapes that keep the order of elements,
    a crop, and at last a sigmoid or softmax. Weights are referred to, not copied.
    """
    recorder = _Recorder(row, images)
    reason = watched(call)
    with _hooks_met() as hooked, recorder:
        output = call(row)
    reason = reason or "".join(hooked[:1]) or recorder.reason
    if not reason and row.dtype in (torch.bfloat16, torch.float16):
        reason = f"codes are {row.dtype}"
    network = None
    if not reason:
        network, reason = recorder.network(output)
    return Recorded(output, max(recorder.bytes, 1), network, reason)


def watched(call: Any) -> str:
    """Why a call must run as it is: hooks that must fire, a module's own forward, autocast. "" if none."""
    module = getattr(call, "__self__", call)
    device_types = {p.device.type for p in module.parameters()} if isinstance(module, nn.Module) else {"cpu"}
    if any(torch.is_autocast_enabled(kind) for kind in device_types):
        return "autocast is on"
    everywhere = (modules._global_forward_hooks, modules._global_forward_pre_hooks)
    if any(everywhere):
        return "global module hooks are set"
    if isinstance(module, nn.Module):
        for name, part in module.named_modules():
            if part._forward_hooks or part._forward_pre_hooks:
                return f"{name or 'the decoder'} has hooks, which must fire"
    return ""


@contextlib.contextmanager
def _hooks_met() -> Iterator[list[str]]:
    """Within, notes the modules with hooks that this thread calls: a function hides those that it uses."""
    found: list[str] = []
    thread = threading.get_ident()

    def look(module: nn.Module, _args: Any) -> None:
        if threading.get_ident() == thread and (module._forward_hooks or module._forward_pre_hooks):
            found.append(f"a {type(module).__name__} that it calls has hooks, which must fire")

    handle = modules.register_module_forward_pre_hook(look)
    try:
        with warnings.catch_warnings():
            # a compiled module warns of hooks that fire twice: this one may
            warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are global hooks")
            yield found
    finally:
        handle.remove()


class _Recorder(TorchDispatchMode):
    """Follows the one tensor that comes from the codes through the operations of a call."""

    def __init__(self, row: Tensor, images: bool):
        super().__init__()
        self.images = images
        self.bytes = 0
        self.reason = ""
        self.layers: list[Layer] = []
        self.grid: tuple[int, int, int] | None = None
        self.crop: tuple[int, int] | None = None
        self.link, self.spans = "identity", ()
        self.current: Tensor = row
        self.pieces: list[Tensor] = []  # of a split, until they are put together
        self.known: dict[int, Tensor] = {id(row): row}  # everything computed from the codes, kept: ids stay theirs

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # then nothing has yet taken composite operations apart
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        from_codes = any(id(t) in self.known for t in given)
        before = self.current.clone() if from_codes and not self.reason else None  # operations in place change it
        out = func(*args, **kwargs)
        storages = {t.untyped_storage().data_ptr() for t in given}
        made = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        self.bytes += sum(t.nbytes for t in made if t.untyped_storage().data_ptr() not in storages)
        if from_codes:
            self.known.update((id(t), t) for t in made)
            if before is not None:
                self.reason = self._step(func, args, kwargs, before, out) or ""
        return out

    def _step(self, func: Any, args: tuple, kwargs: dict, before: Tensor, out: Any) -> str | None:
        """Take one operation into the network; the reason if it does not fit."""
        name = str(func)
        if self.pieces:
            return self._join(func, args, out)
        position = next((n for n, a in enumerate(args) if a is self.current), None)
        others = [t for n, a in enumerate(args) if n != position for t in tree_iter(a) if isinstance(t, Tensor)]
        if position is None or any(id(t) in self.known for t in others):
            return f"{name} branches off the chain of layers"
        if self.link != "identity":
            if func in RESHAPES and out.shape[:1] == before.shape[:1]:
                self.current = out
                return None
            return f"{name} follows the {self.link}"
        if func in (aten.addmm.default, aten.mm.default, aten.convolution.default):
            reason = self._layer(func, args, kwargs, position)
        elif func in ACTIVATIONS:
            reason = self._activation(func, args)
        elif func in _NORMS:
            reason, out = self._norm(func, args), out[0]
        elif func is aten._softmax.default:
            reason = self._softmax(args[1], before)
        elif func in _SPLITS:
            if args[2:] and args[2] % before.ndim != before.ndim - 1 or before.ndim != 2:
                return f"{name} splits something else than elements of a row"
            self.pieces = list(out)
            return None
        elif func is aten.add.Tensor and not kwargs:
            reason = self._bias(others, before)
        elif func is aten.slice.Tensor and before.ndim == 4 and args[1] in (2, 3) and (args[2] or 0) == 0:
            crop = self.crop or tuple(before.shape[2:])
            self.crop = (out.shape[2], crop[1]) if args[1] == 2 else (crop[0], out.shape[3])
            reason = None if (args[4] if len(args) > 4 else 1) == 1 else f"{name} takes every other element"
        elif func in RESHAPES and out.shape[:1] == before.shape[:1]:
            reason = None
        else:
            return f"{name} is no layer that the kernels know"
        self.current = out
        return reason

    def _layer(self, func: Any, args: tuple, kwargs: dict, position: int) -> str | None:
        if self.crop is not None:
            return "a layer follows a crop"
        if func is aten.convolution.default:
            return self._convolution(args, position)
        at = 1 if func is aten.addmm.default else 0
        if position != at or kwargs or (self.layers and not isinstance(self.layers[-1], Dense)):
            return f"{func} is no linear layer on a row of elements"
        bias = args[0] if at else None
        weight = args[at + 1].T
        if bias is not None and bias.shape != (weight.shape[0],):
            return f"{func} adds a {tuple(bias.shape)}, which is no bias"
        self.layers.append(Dense(weight, bias))
        return None

    def _convolution(self, args: tuple, position: int) -> str | None:
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
        if position != 0 or x.ndim != 4:
            return "a convolution is not two-dimensional"
        if groups != 1 or any(d != 1 for d in dilation):
            return "a convolution has groups or dilation"
        if not self.layers and not self.images:
            return "the first layer is a convolution"
        if not transposed:
            if any(s != 1 for s in stride):
                return "a convolution has a stride"
            weight = weight.transpose(0, 1).flip(2, 3)
            padding = [k - 1 - p for k, p in zip(weight.shape[2:], padding, strict=True)]
            if min(padding) < 0:
                return "a convolution pads more than its kernel"
        if not self.layers or isinstance(self.layers[-1], Dense):
            self.grid = tuple(x.shape[1:])
        a, b, c = ((int(v[0]), int(v[-1])) for v in (stride, padding, output_padding))
        self.layers.append(TransposedConvolution(weight, bias, stride=a, padding=b, output_padding=c))
        return None

    def _activation(self, func: Any, args: tuple) -> str | None:
        name = ACTIVATIONS[func]
        if not self.layers:
            return f"{name} comes before the first layer"
        if self.layers[-1].activation != "identity":
            return f"{name} follows {self.layers[-1].activation}"
        slope = 0.0
        if name == "leaky_relu":
            slope = float(args[1]) if len(args) > 1 else 0.01
        if name == "elu":
            slope, *scales = [float(a) for a in args[1:]] or [1.0]
            if any(scale != 1 for scale in scales):
                return "an elu is scaled"
        self.layers[-1] = replace(self.layers[-1], activation=name, slope=slope)
        return None

    def _norm(self, func: Any, args: tuple) -> str | None:
        weight, bias, mean, var = args[1:5]
        training = func is aten.native_batch_norm.default and args[5]
        if not self.layers or self.layers[-1].activation != "identity" or training or mean is None:
            return "batch norm does not follow a layer directly"
        last = self.layers[-1]
        scale = (var.double() + args[-1]).rsqrt() * (1 if weight is None else weight.double())
        shift = 0 if bias is None else bias.double()
        old = 0 if last.bias is None else last.bias.double()
        shape = (-1, 1) if isinstance(last, Dense) else (1, -1, 1, 1)
        folded = (last.weight.double() * scale.view(shape)).to(last.weight.dtype)
        self.layers[-1] = replace(last, weight=folded, bias=((old - mean.double()) * scale + shift).to(folded.dtype))
        return None

    def _bias(self, others: list[Tensor], before: Tensor) -> str | None:
        last = self.layers[-1] if self.layers else None
        fits = len(others) == 1 and others[0].numel() == before.shape[1] and others[0].shape[-1:] == before.shape[1:]
        if not isinstance(last, Dense) or last.activation != "identity" or last.bias is not None or not fits:
            return "something is added that is no bias"
        self.layers[-1] = replace(last, bias=others[0].flatten())
        return None

    def _softmax(self, dim: int, before: Tensor) -> str | None:
        if before.ndim != 2 or dim % 2 != 1:
            return "softmax is not over the elements of a row"
        self.link, self.spans = "softmax", (before.shape[1],)
        return None

    def _join(self, func: Any, args: tuple, out: Any) -> str | None:
        """Softmaxes of the pieces of a split, put together again in their order."""
        if func is aten._softmax.default:
            at = next((n for n, piece in enumerate(self.pieces) if piece is args[0]), None)
            if at is None or args[1] % args[0].ndim != args[0].ndim - 1:
                return f"{func} is not over one piece of a split"
            self.pieces[at] = out
            self.spans = (*self.spans, out.shape[1])
            return None
        parts = args[0] if func is aten.cat.default else ()
        if len(parts) != len(self.pieces) or any(p is not q for p, q in zip(parts, self.pieces, strict=True)):
            return f"{func} takes a row apart"
        if len(self.spans) != len(parts):
            return "some columns of a row have a softmax and others none"
        self.link, self.spans, self.pieces, self.current = "softmax", tuple(p.shape[1] for p in parts), [], out
        return None

    def network(self, output: Any) -> tuple[Network | None, str]:
        """The network whose output that is, or why there is none."""
        if output is not self.current:
            return None, "the output is not the end of one chain of layers"
        if not self.layers:
            return None, "there is no layer"
        layers = list(self.layers)
        link = self.link
        if layers[-1].activation == "sigmoid" and link == "identity":
            layers[-1], link = replace(layers[-1], activation="identity"), "sigmoid"
        network = Network(tuple(layers), self.grid, self.crop, link, self.spans)
        try:
            shape = network.shapes()[-1]
        except InputError as error:
            return None, str(error).removeprefix("network: ")
        if math.prod(shape) != output[0].numel():
            return None, "its layers do not make its output"
        return network, ""
