"""Runs of a module whose activations are read, changed or patched (level 3), on any module."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from ..errors import InputError
from .engine import channels_last, refuse_train_mode
from .selection import Selection, is_pattern, parse, resolve

ABLATIONS = ("zero", "mean", "mean-positional", "resample", "noise")
Readout = Callable[[Any], Tensor]


class Cache(dict[str, Tensor]):
    """Activations by site, as `run_with_cache` found them: (N, ...) each; "site.input" for inputs."""


@contextlib.contextmanager
def quiet(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within, the module is in eval mode without gradients, its parameters as a CPU's convolutions like them, and what
    torch.compile made of it runs as it was written; all of it restored."""
    was_training = [m for m in module.modules() if m.training]
    try:
        module.eval()
        refuse_train_mode(module)
        with torch.no_grad(), channels_last(module, device), as_written():
            yield
    finally:
        for m in was_training:
            m.training = True


def as_written() -> contextlib.AbstractContextManager:
    """Within, nothing is compiled and nothing compiled runs: it would ignore hooks, or be compiled again for each."""
    if "torch._dynamo" not in sys.modules:  # which takes seconds to import, and nobody has
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def inputs_of(x: Any) -> tuple[tuple[Any, ...], int]:
    """The arguments of a call, and how many rows the first tensor has. InputError for anything else."""
    args = x if isinstance(x, tuple) else (x,)
    first = next((a for a in args if isinstance(a, Tensor) and a.ndim), None)
    if first is None or not len(first):
        raise InputError(
            f"x: expected a tensor (N, ...) or a tuple of arguments with one, N > 0, got {type(x).__name__}"
        )
    # of all numbers only two: no copy of them is made
    if first.is_floating_point() and first.numel() and not all(bool(torch.isfinite(e)) for e in torch.aminmax(first)):
        raise InputError("x: contains NaN or infinity")
    return args, len(first)


def taken(args: tuple[Any, ...], rows: int, part: slice, repeats: int = 1) -> tuple[Any, ...]:
    """The arguments for some of the rows, each repeated; what has no rows is passed on."""

    def of(a: Any) -> Any:
        if isinstance(a, Tensor) and a.ndim and len(a) == rows:
            return a[part].repeat_interleave(repeats, 0) if repeats > 1 else a[part]
        return a

    return tuple(map(of, args))


def read_out(y: Any, readout: Readout | None) -> Any:
    """What of a module's output is compared: readout's choice, or the only tensor that a mapping, sequence or dataclass
    holds. InputError where there are several."""
    if readout is not None:
        return readout(y)
    if isinstance(y, Tensor):
        return y
    parts = y.values() if isinstance(y, Mapping) else vars(y).values() if is_dataclass(y) else y
    found = [t for t in tree_iter(list(parts) if isinstance(parts, Iterable) else parts) if isinstance(t, Tensor)]
    if len(found) != 1:
        raise InputError(
            f"module: its output is {type(y).__name__}; readout= must choose one of the {len(found)} tensors in it"
        )
    return found[0]


def run_with_cache(module: nn.Module, x: Any, sites: Sequence[str] = ("*",)) -> tuple[Any, Cache]:
    """The module's output for x and the activations (N, ...) at the sites, by path; "path.input" for what goes in.

    x: a tensor (N, ...) or a tuple of arguments. sites: paths or shell-style patterns. In eval mode, without gradients.
    InputError for a site that is not reached, runs several times or gives no tensor; patterns leave such ones out.
    """
    args, rows = inputs_of(x)
    exact = {str(s) for spec in sites for s in resolve(module, spec) if not is_pattern(spec)}
    chosen = list(dict.fromkeys(s for spec in sites for s in resolve(module, spec)))
    found: dict[str, list[Any]] = {str(s): [] for s in chosen}
    modules = dict(module.named_modules())
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet(module, device_of(args)))
        for s in chosen:
            if s.index or s.each:
                raise InputError(f"{s}: a cache holds whole sites, without units")
            stack.callback(_watch(modules[s.site], s, found[str(s)].append).remove)
        y = module(*args)
    cache = Cache()
    for name, seen in found.items():
        problem = _problem(name, seen, rows)
        if problem is None:
            cache[name] = seen[0]
        elif name in exact:
            raise InputError(problem)
    return y, cache


class _Reached(BaseException):
    """All that was asked for has passed: what is behind it need not run."""


def site_values(
    module: nn.Module, args: tuple[Any, ...], rows: int, part: slice, sites: Sequence[str], tile: int
) -> dict[str, Tensor]:
    """Activations (B, ...) at sites, by name, for the rows of `part`, `tile` rows at a time and no further than needed.

    Within `quiet`. sites: paths, or "path.input", which one row's pass is known to reach once. InputError for those
    that are not reached here or give no floats (B, ...).
    """
    modules = dict(module.named_modules())
    chosen = {name: parse(name) for name in dict.fromkeys(sites)}
    found: dict[str, list[Tensor]] = {name: [] for name in chosen}
    with contextlib.ExitStack() as stack:
        now: dict[str, list[Any]] = {}
        for name, s in chosen.items():

            def keep(x: Any, name: str = name) -> None:
                now[name].append(x)
                if all(now.values()):
                    raise _Reached

            stack.callback(_watch(modules[s.site], s, keep).remove)
        for n in range(part.start, part.stop, tile):
            some = slice(n, min(n + tile, part.stop))
            now.update((name, []) for name in chosen)
            with contextlib.suppress(_Reached):
                module(*taken(args, rows, some))
            for name, seen in now.items():
                problem = _problem(name, seen[:1], some.stop - some.start)
                if problem is not None:
                    raise InputError(problem)
                found[name].append(seen[0])
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}


def _problem(name: str, seen: list[Any], rows: int) -> str | None:
    if not seen:
        return f"{name}: is not reached when the module runs; choose another site"
    if len(seen) > 1:
        return f"{name}: runs {len(seen)} times in one pass; choose a module that runs once"
    if not isinstance(seen[0], Tensor) or not seen[0].is_floating_point() or seen[0].shape[:1] != (rows,):
        given = f"{seen[0].dtype} {tuple(seen[0].shape)}" if isinstance(seen[0], Tensor) else type(seen[0]).__name__
        return f"{name}: gives {given}, expected floats (N = {rows}, ...)"
    return None


def _watch(module: nn.Module, selection: Selection, keep: Callable[[Any], Any]) -> Any:
    """Passes on copies: a later module may change a tensor in place."""

    def copied(x: Any) -> Any:
        return x.detach().clone() if isinstance(x, Tensor) else x

    if selection.side == "input":
        return module.register_forward_pre_hook(lambda _module, args: keep(copied(args[0] if args else None)))
    return module.register_forward_hook(lambda _module, _args, out: keep(copied(out)))


def run_with_hooks(module: nn.Module, x: Any, hooks: Mapping[str, Callable[[Tensor], Tensor]]) -> Any:
    """The module's output for x where each site's activation a passes through its hook: a -> hook(a), of a's shape.

    hooks: by site; every one must be reached. In eval mode, without gradients. InputError for sites that are not
    reached, and for a hook that changes shape or dtype.
    """
    args, _ = inputs_of(x)
    modules = dict(module.named_modules())
    fired: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet(module, device_of(args)))
        for spec, hook in hooks.items():
            for s in resolve(module, spec):
                fired[str(s)] = 0
                stack.callback(_change(modules[s.site], s, hook, fired).remove)
        y = module(*args)
    for name, times in fired.items():
        if not times:
            raise InputError(f"{name}: is not reached when the module runs; choose another site")
    return y


def _change(module: nn.Module, s: Selection, hook: Callable[[Tensor], Tensor], fired: dict[str, int]) -> Any:
    def changed(a: Any) -> Tensor:
        fired[str(s)] += 1
        if not isinstance(a, Tensor):
            raise InputError(f"{s}: gives {type(a).__name__}, expected a tensor; choose a module inside it")
        new = hook(a)
        if not isinstance(new, Tensor) or new.shape != a.shape or new.dtype != a.dtype:
            given = f"{new.dtype} {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
            raise InputError(f"{s}: its hook gives {given}, expected {a.dtype} {tuple(a.shape)}")
        return new

    if s.side == "input":
        return module.register_forward_pre_hook(lambda _module, args: (changed(args[0]), *args[1:]))
    return module.register_forward_hook(lambda _module, _args, out: changed(out))


def patch(module: nn.Module, x_base: Any, patches: Mapping[str, Any], *, reference: Any = None, seed: int = 0) -> Any:
    """The module's output for x_base with the chosen units of all these sites patched jointly, in one run.

    patches: spec -> what the units become: a Cache of another run, activations (N, ...) or (...) of the whole site, or
    "zero", "mean", "mean-positional", "resample", "noise" over `reference`, inputs like x_base ("resample": each
    sample takes another reference's). InputError for shapes that do not fit, unknown names and sites not reached.
    """
    inputs_of(x_base)
    chosen = [(s, value) for spec, value in patches.items() for s in resolve(module, spec)]
    if not chosen:
        raise InputError("patches: expected at least one site")
    references = Cache()
    if reference is not None:  # before any hook is set, which would fire in this run too
        wanted = {_site(s) for s, value in chosen if isinstance(value, str) and value != "zero"}
        references = run_with_cache(module, reference, sorted(wanted))[1] if wanted else references
    hooks: dict[str, Callable[[Tensor], Tensor]] = {}
    times: dict[str, int] = {}
    for s, value in chosen:
        hooks[_site(s)] = _replacing(s, value, references, seed, times, hooks.get(_site(s)))
    y = run_with_hooks(module, x_base, hooks)
    for name, count in times.items():
        if count > 1:
            raise InputError(f"{name}: runs {count} times in one pass; choose a module that runs once")
    return y


def _site(s: Selection) -> str:
    return str(Selection(s.site, s.side))


def _replacing(
    s: Selection,
    value: Any,
    references: Mapping[str, Tensor],
    seed: int,
    times: dict[str, int],
    before: Callable[[Tensor], Tensor] | None,
) -> Callable[[Tensor], Tensor]:
    """The hook that patches one selection, after an earlier one of the same site."""

    def hook(a: Tensor) -> Tensor:
        times[str(s)] = times.get(str(s), 0) + 1
        mask = s.mask(a.shape[1:]).view(a.shape[1:]).to(a.device)
        if isinstance(value, str):
            source = ablated(value, a, references.get(_site(s)), seed)
        else:
            source = value.get(_site(s)) if isinstance(value, Mapping) else value
            if source is None:
                raise InputError(f"{s}: the cache holds no {_site(s)}; run_with_cache(..., sites=[{_site(s)!r}])")
            if not isinstance(source, Tensor) or source.shape not in (a.shape, a.shape[1:]):
                given = tuple(source.shape) if isinstance(source, Tensor) else type(source).__name__
                raise InputError(f"{s}: the source has shape {given}, the base {tuple(a.shape)}")
        return torch.where(mask, source.to(a), a if before is None else before(a))

    return hook


def ablated(how: str, a: Tensor, reference: Tensor | None, seed: int) -> Tensor:
    """What replaces activations a (N, ...): zero; the reference's mean of each channel or of each element
    ("mean-positional"); the activations of other reference samples; noise of the reference's mean and sd by element."""
    if how not in ABLATIONS:
        raise InputError(f"ablation: {how!r} is unknown; known: {', '.join(ABLATIONS)}")
    if how == "zero":
        return torch.zeros_like(a)
    if reference is None:
        raise InputError(f"ablation: {how!r} needs reference=, inputs whose activations are used")
    if reference.shape[1:] != a.shape[1:]:
        raise InputError(f"reference: gives {tuple(reference.shape[1:])} at the site, the base {tuple(a.shape[1:])}")
    if how == "mean":
        places = [axis for axis in range(reference.ndim) if axis != _channel_axis(reference)]
        return reference.mean(places, keepdim=True).expand(a.shape)
    if how == "mean-positional":
        return reference.mean(0, keepdim=True).expand(a.shape)
    generator = torch.Generator().manual_seed(seed)
    if how == "resample":
        picks = torch.randint(len(reference), (len(a),), generator=generator)
        return reference[picks.to(reference.device)]
    noise = torch.randn(a.shape, generator=generator, dtype=torch.float64).to(a)
    return reference.mean(0) + noise * reference.std(0, correction=0)


def _channel_axis(a: Tensor) -> int:
    return a.ndim - 1 if a.ndim == 3 else 1


def device_of(args: tuple) -> torch.device:
    return next(a.device for a in args if isinstance(a, Tensor))
