"""captum's `LayerFeatureAblation` by its own signature: the same numbers, what is before the layer computed once.

    from vaecirc_fast.compat.captum import LayerFeatureAblation

captum itself is neither imported nor needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..interventions.engine import channels_last
from ..interventions.patching import as_written, device_of
from ..interventions.versions import Versions


class LayerFeatureAblation:
    """What the output changes by when elements of a layer's output, or input, are replaced by a baseline.

    forward_func: a module, or a function that calls one, (inputs, additional_forward_args) -> tensor. layer: the module
    whose activation is ablated. device_ids: refused, as there is one device.
    """

    def __init__(
        self, forward_func: Callable[..., Tensor], layer: nn.Module, device_ids: list[int] | None = None
    ) -> None:
        if not callable(forward_func):
            raise InputError(f"forward_func: expected a callable, got {type(forward_func).__name__}")
        if not isinstance(layer, nn.Module):
            raise InputError(f"layer: expected a torch.nn.Module, got {type(layer).__name__}")
        if device_ids is not None or getattr(forward_func, "device_ids", None) is not None:
            raise InputError("device_ids: runs on one device; give the module that DataParallel wraps")
        self.forward_func, self.layer, self.device_ids = forward_func, layer, device_ids

    @torch.no_grad()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        layer_baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        layer_mask: Tensor | tuple[Tensor, ...] | None = None,
        attribute_to_layer_input: bool = False,
        perturbations_per_eval: int = 1,
    ) -> Tensor:
        """Attributions (outputs, ...): for each element of the layer's activation (B, ...) the output less the output
        when the element's group is ablated. Where forward_func gives, or target chooses, one number for each of the B
        inputs, these are its outputs; where it gives one number for all, there is one; else all of its elements are.

        layer_baselines: what ablated elements become, a number or a tensor that broadcasts to the activation; 0 by
        default. target: of outputs (B, K, ...) an integer, a tuple, or a list or tensor of one for each input.
        layer_mask: integers, of a shape that broadcasts to the activation: equal ones are ablated together; each
        element by itself by default. perturbations_per_eval: as many ablations as fit run together, whatever it is.

        In the mode that the module is in. InputError names what cannot be the same: a layer that is not reached, runs
        several times or has several tensors, and modules that draw random numbers or decide by values.
        """
        if not isinstance(perturbations_per_eval, int) or perturbations_per_eval < 1:
            given = repr(perturbations_per_eval)
            raise InputError(f"perturbations_per_eval: expected an integer of at least 1, got {given}")
        args = _tuple(inputs)
        if not all(isinstance(a, Tensor) for a in args):
            raise InputError("inputs: expected a tensor (B, ...) or a tuple of them")
        args += () if additional_forward_args is None else _tuple(additional_forward_args)
        owner = nn.ModuleDict({"layer": self.layer})
        site = "layer.input" if attribute_to_layer_input else "layer"
        with as_written(), channels_last(self.forward_func, device_of(args)):
            with self._one_tensor(attribute_to_layer_input):
                versions = Versions(owner, self.forward_func, args, [site])
            own = versions.activation(site)
            mask, baseline = _mask(layer_mask, own), _baseline(layer_baselines, own)
            base = selected(versions.output, target).reshape(-1)
            total = torch.zeros(base.numel(), *own.shape[1:], dtype=base.dtype, device=own.device)
            groups = mask.unique().tolist()
            ablated = (torch.where(mask == group, baseline, own) for group in groups)
            for group, y in zip(groups, versions.run(site, ablated), strict=True):
                change = (base - selected(y, target).reshape(-1)).to(own.device)
                total += change.view(-1, *[1] * (own.ndim - 1)) * (mask == group).to(total.dtype)
        return total

    @contextlib.contextmanager
    def _one_tensor(self, of_input: bool) -> Iterator[None]:
        """InputError where the layer takes, or gives, several tensors, or none."""

        def check(given: Any) -> None:
            what = "takes" if of_input else "gives"
            parts = given if isinstance(given, tuple) else (given,)
            if len(parts) != 1 or not isinstance(parts[0], Tensor):
                raise InputError(f"layer: {what} {len(parts)} values, expected one tensor; choose a module inside it")

        if of_input:
            handle = self.layer.register_forward_pre_hook(lambda _module, given: check(given))
        else:
            handle = self.layer.register_forward_hook(lambda _module, _given, out: check(out))
        try:
            yield
        finally:
            handle.remove()


def _tuple(x: Any) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def _single(name: str, x: Any) -> Any:
    if isinstance(x, tuple):
        if len(x) != 1:
            raise InputError(f"{name}: has {len(x)} parts, but the layer one tensor")
        return x[0]
    return x


def _mask(layer_mask: Any, own: Tensor) -> Tensor:
    mask = _single("layer_mask", layer_mask)
    if mask is None:
        return torch.arange(own[:1].numel(), device=own.device).view(own[:1].shape)
    if not isinstance(mask, Tensor) or mask.is_floating_point() or not _broadcasts(mask, own):
        given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"layer_mask: expected integers that broadcast to {tuple(own.shape)}, got {given}")
    return mask.to(own.device).view(*[1] * (own.ndim - mask.ndim), *mask.shape)


def _baseline(layer_baselines: Any, own: Tensor) -> Tensor:
    baseline = _single("layer_baselines", layer_baselines)
    if baseline is None or isinstance(baseline, int | float):
        return torch.tensor(baseline or 0.0, dtype=own.dtype, device=own.device)
    if isinstance(baseline, Tensor) and _broadcasts(baseline, own):
        return baseline.to(own)
    given = tuple(baseline.shape) if isinstance(baseline, Tensor) else type(baseline).__name__
    expected = f"a number or a tensor that broadcasts to {tuple(own.shape)}"
    raise InputError(f"layer_baselines: expected {expected}, got {given}")


def _broadcasts(x: Tensor, own: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(x.shape, own.shape) == own.shape
    except RuntimeError:
        return False


def selected(y: Tensor, target: Any) -> Tensor:
    """What `target` chooses of an output: all of it for None; y[:, target] for an integer or a tuple; for a list, or a
    tensor of one axis, of each row its own."""
    if target is None:
        return y
    if isinstance(target, Tensor):
        target = target.tolist() if target.ndim == 1 and target.numel() > 1 else int(target)
    if isinstance(target, int | tuple):
        index = (target,) if isinstance(target, int) else target
        if len(index) > y.ndim - 1:
            raise InputError(f"target: {target} has more indices than an output of shape {tuple(y.shape)} has axes")
        return y[(slice(None), *index)]
    if not isinstance(target, list) or len(target) != len(y):
        given = f"{len(target)}" if isinstance(target, list) else type(target).__name__
        raise InputError(f"target: expected an integer, a tuple, or one for each of the {len(y)} rows, got {given}")
    return torch.stack([y[(row, *_tuple(t))] for row, t in enumerate(target)])
