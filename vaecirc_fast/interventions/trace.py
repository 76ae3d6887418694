"""The operations that one forward pass executes, as a graph that runs again from any point on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from ..errors import InputError

REPRODUCES = 1024  # epsilons of the largest output: a program runs what the module runs, at the same shapes
NOT_REPEATABLE = "it keeps state between calls, draws random numbers, or computes outside torch on values that it reads"


@dataclass(frozen=True)
class Value:
    """A tensor that came from the inputs, by the number of its making; an operation in place makes a new one."""

    number: int


@dataclass(frozen=True)
class Step:
    """One operation: its arguments with Values in place of tensors that came from the inputs, and what it made.

    made: the Value of each returned tensor, None for one that needs none. written: (position, Value) of arguments that
    the operation changes in place, and what they are afterwards.
    """

    func: Any
    args: tuple
    kwargs: Mapping[str, Any]
    made: tuple[Value | None, ...]
    written: tuple[tuple[int, Value], ...]
    reads: tuple[Value, ...]

    @property
    def makes(self) -> set[Value]:
        """The values that are new once it has run."""
        return {v for v in (*self.made, *(v for _, v in self.written)) if v is not None}

    @cached_property
    def _plain(self) -> tuple[tuple[int, Value], ...]:
        return tuple((n, a) for n, a in enumerate(self.args) if isinstance(a, Value))

    @cached_property
    def _nested(self) -> tuple[int | str, ...]:
        """Arguments with Values inside lists."""
        named = [(n, a) for n, a in enumerate(self.args) if not isinstance(a, Value)] + list(self.kwargs.items())
        return tuple(n for n, a in named if any(map(_is_value, tree_iter(a, is_leaf=_is_value))))

    def arguments(self, current: Mapping[Value, Tensor]) -> tuple[list, dict]:
        """Positional and keyword arguments with tensors in place of Values."""
        args, keywords = list(self.args), dict(self.kwargs)
        for n, value in self._plain:
            args[n] = current[value]
        for n in self._nested:
            where: Any = args if isinstance(n, int) else keywords
            where[n] = tree_map(lambda a: current[a] if isinstance(a, Value) else a, where[n], is_leaf=_is_value)
        return args, keywords


@dataclass
class Place:
    """What passed a module: the values of its input and output each time it ran, and their shapes."""

    inputs: list[Value | None] = field(default_factory=list)
    outputs: list[Value | None] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class Trace:
    """A forward pass on a batch of fixed size."""

    inputs: tuple[Value, ...]
    output: Value
    steps: tuple[Step, ...]
    places: Mapping[str, Place]
    flops: tuple[int, ...]  # of each step: matrix products and convolutions
    layouts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # shape and strides of each Value, by its number

    def downstream(self, starts: Iterable[Value]) -> Program:
        """What must run again once these values are others; all else keeps its value."""
        starts = set(starts)
        changed = set(starts)
        chosen = []
        for n, step in enumerate(self.steps):
            if changed.isdisjoint(step.reads):
                continue
            chosen.append(n)
            changed.update(step.makes - starts)
        return Program(self, tuple(chosen), starts)

    def between(self, starts: Iterable[Value], end: Value) -> Program:
        """What of `downstream` this value needs; nothing where it does not depend on the starts, or is one."""
        starts = set(starts)
        wanted = {end} - starts
        chosen = []
        for n in reversed(self.downstream(starts).chosen):
            step = self.steps[n]
            if not wanted.isdisjoint(step.makes):
                chosen.append(n)
                wanted.update(set(step.reads) - starts)
        return Program(self, tuple(reversed(chosen)), starts)

    def reached(self, starts: Iterable[Value], held: Iterable[Value] = ()) -> set[Value]:
        """The starts and all values that depend on them while those of `held` are kept."""
        held = set(held)
        changed = set(starts) - held
        for step in self.steps:
            if not changed.isdisjoint(step.reads):
                changed.update(step.makes - held)
        return changed

    def everything(self) -> Program:
        """The whole pass."""
        return self.downstream(self.inputs)


class Program:
    """Some steps of a trace, with what they need from before and when each value is last used."""

    def __init__(self, trace: Trace, chosen: tuple[int, ...], starts: set[Value]):
        self.trace, self.chosen, self.starts = trace, chosen, starts
        self.flops = sum(trace.flops[n] for n in chosen)
        made: set[Value] = set(starts)
        needs: set[Value] = set()
        last: dict[Value, int] = {}
        for n in chosen:
            step = trace.steps[n]
            needs.update(v for v in step.reads if v not in made)
            made.update(step.makes)
            last.update((v, n) for v in step.reads)
        self.needs = frozenset(needs)
        self.reaches = trace.output in made
        self._made = made
        self._dead: dict[int, list[Value]] = {}
        for value, n in last.items():
            self._dead.setdefault(n, []).append(value)

    def last_used(self, step: int) -> Sequence[Value]:
        """Values that no step after this one reads."""
        return self._dead.get(step, ())

    def run(self, values: Mapping[Value, Tensor], keep: Collection[Value] = ()) -> dict[Value, Tensor]:
        """Run the steps on `values`, the starts and all of `needs`; returns the output and what `keep` names."""
        wanted = {self.trace.output, *keep}
        current = dict(values)
        for n in self.chosen:
            step = self.trace.steps[n]
            args, keywords = step.arguments(current)
            for position, _ in step.written:
                args[position] = args[position].clone()  # what others read stays as it is
            out = step.func(*args, **keywords)
            tensors = (out,) if isinstance(out, Tensor) else [t for t in tree_iter(out) if isinstance(t, Tensor)]
            for value, t in zip(step.made, tensors, strict=True):
                # a start keeps the value that it was given
                if value is not None and value not in self.starts:
                    current[value] = t
            for position, value in step.written:
                if value not in self.starts:
                    current[value] = args[position]
            for value in self._dead.get(n, ()):
                if value not in wanted:
                    current.pop(value, None)
        return {value: current[value] for value in wanted if value in current}


def laid_out(new: Tensor, like: Tensor) -> Tensor:
    """`new` (of any shape, as many elements) in the shape and the memory layout of `like`: the views that a pass took
    of one fit the other."""
    new = new.view(like.shape)
    return new if new.stride() == like.stride() else torch.empty_like(like, dtype=new.dtype).copy_(new)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two results of the same computation agree up to the rounding of another order of additions."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b, eps = a.double(), b.double(), torch.finfo(a.dtype).eps
    apart = (a - b).abs()
    return bool((apart <= min(REPRODUCES * eps, 1 / 16) * b.abs().amax()).all()) or torch.equal(a, b)


def _is_value(x: Any) -> bool:
    return isinstance(x, Value)


def trace(
    module: nn.Module, call: Callable[..., Any], args: Sequence[Tensor], sites: Iterable[str] = ()
) -> tuple[Trace, Tensor]:
    """Run `call(*args)`, which runs `module`, and return what it executed with its output, a tensor.

    sites: modules by path whose inputs and outputs are noted. A site's value is its own, as a hook's is: a module that
    passes its input on gives a copy, and "path.input" asks that the module of that path be given one. InputError names
    what cannot be run again faithfully: random numbers, decisions that depend on values, buffers that the pass
    changes.
    """
    modules = dict(module.named_modules())
    recorder = _Recorder(args, {id(m): name for name, m in modules.items()})
    sites = list(sites)
    copied = {name.removesuffix(".input") for name in sites if name not in modules}
    names = dict.fromkeys(name if name in modules else name.removesuffix(".input") for name in sites)
    with ExitStack() as stack, torch.no_grad():
        for name in names:
            entering = recorder.entering(name, name in copied)
            stack.callback(modules[name].register_forward_pre_hook(entering, with_kwargs=True).remove)
            stack.callback(modules[name].register_forward_hook(recorder.leaving(name)).remove)
        stack.enter_context(recorder)
        output = call(*args)
    if recorder.refusal:
        raise InputError(recorder.refusal)
    if not isinstance(output, Tensor):
        raise InputError(f"module: its output is {type(output).__name__}; readout= must choose a tensor of it")
    value = recorder.value_of(output)
    if value is None:
        raise InputError("module: its output does not come from its input through torch's operations")
    steps, flops = tuple(recorder.steps), tuple(recorder.flops)
    return Trace(recorder.inputs, value, steps, recorder.places, flops, recorder.layouts()), output


_PARENT = object()


@dataclass(frozen=True, eq=False)
class _View:
    """How a tensor was made of its parent, whose memory it shares: the n-th of what the operation gives."""

    func: Any
    args: tuple  # with _PARENT
    kwargs: Mapping[str, Any]
    n: int

    def of(self, parent: Tensor) -> Tensor:
        """The same view of another tensor of the parent's layout."""
        args = tree_map(lambda a: parent if a is _PARENT else a, self.args)
        return [t for t in tree_iter(self.func(*args, **self.kwargs)) if isinstance(t, Tensor)][self.n]


@dataclass(frozen=True)
class _Rewritten:
    """An operation that writes into a view, or into what has views: (root, other arguments) -> the root and all views
    of it, in order, as they are afterwards. target: the number of the view that is written into."""

    func: Any
    position: int
    target: int
    chains: tuple[tuple[_View, ...], ...] = field(compare=False)

    def __call__(self, root: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
        root = root.clone()  # what others read stays as it is
        self.func(*args[: self.position], self._view(self.target, root), *args[self.position :], **kwargs)
        return [self._view(n, root) for n in range(len(self.chains))]

    def _view(self, n: int, root: Tensor) -> Tensor:
        for view in self.chains[n]:
            root = view.of(root)
        return root


class _Recorder(TorchDispatchMode):
    """Notes every operation on tensors that come from the inputs."""

    def __init__(self, inputs: Sequence[Tensor], names: Mapping[int, str]):
        super().__init__()
        self._names = names  # of modules, by id
        self.steps: list[Step] = []
        self.flops: list[int] = []
        self.places: dict[str, Place] = {}
        self.refusal = ""
        self._values: dict[int, Value] = {}
        self._kept: list[Tensor] = []  # ids stay theirs while the tensors live
        self._storages: dict[int, list[Tensor]] = {}  # the tensors that lie in a storage
        self._views: dict[int, tuple[Tensor, _View]] = {}  # by id, the tensor that one is a view of
        self._foreign: set[int] = set()  # storages of parameters and buffers
        self.inputs = tuple(self._new(t) for t in inputs)

    def layouts(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        return tuple((tuple(t.shape), t.stride()) for t in self._kept)

    def value_of(self, tensor: Any) -> Value | None:
        return self._values.get(id(tensor))

    def entering(self, name: str, copy: bool):
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            replaced = copy and bool(args) and isinstance(args[0], Tensor)
            if replaced:
                args = (args[0].clone(), *args[1:])
            given = next((t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)), None)
            self.places.setdefault(name, Place()).inputs.append(self.value_of(given))
            return (args, kwargs) if replaced else None

        return hook

    def leaving(self, name: str):
        def hook(_module: nn.Module, args: tuple, output: Any) -> Any:
            place = self.places.setdefault(name, Place())
            first = output if isinstance(output, Tensor) else None
            value = self.value_of(first)
            if first is not None and value is not None and value == place.inputs[-1]:
                output = first = first.clone()
            place.outputs.append(self.value_of(first))
            place.shapes.append(() if first is None else tuple(first.shape))
            return output

        return hook

    def _new(self, tensor: Tensor, again: bool = False) -> Value:
        """The value of a tensor; `again`: of one that has had another."""
        value = Value(len(self._kept))
        self._kept.append(tensor)
        self._values[id(tensor)] = value
        if not again:
            storage = tensor.untyped_storage().data_ptr()
            self._storages.setdefault(storage, []).append(tensor)
        return value

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        tracked = any(id(t) in self._values for t in given)
        if _draws(func, args, kwargs):
            self._refuse(f"{func} draws random numbers; call eval(), or fix what is drawn")
        if tracked and torch.Tag.data_dependent_output in func.tags:
            self._refuse(f"{func} makes a decision or a shape depend on values")
        if tracked and func is torch.ops.aten.as_strided.default:
            self._refuse(f"{func} reads memory whatever lies in it; use view, expand or unfold")
        if not tracked:
            return func(*args, **kwargs)

        def noted(leaf: Any) -> Any:
            return self._values.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

        arguments, keywords = tree_map(noted, tuple(args)), tree_map(noted, dict(kwargs))
        reads = tuple(v for v in tree_iter((arguments, keywords), is_leaf=_is_value) if isinstance(v, Value))
        writes = self._writes(func, args, kwargs)
        behind = self._behind_view(func, args, writes)
        out = func(*args, **kwargs)
        if behind is not None:
            again, root, aliases = behind
            values = (self._values[id(root)], *arguments[: again.position], *arguments[again.position + 1 :])
            reads = tuple(v for v in tree_iter((values, keywords), is_leaf=_is_value) if isinstance(v, Value))
            made = tuple(self._new(alias, again=True) for alias in aliases)
            self.steps.append(Step(again, values, keywords, made, (), reads))
            self.flops.append(0)
            return out
        if not writes:
            self._note_views(func, args, kwargs, given, out)
        written = tuple((position, self._new(args[position], again=True)) for position in writes)
        already = {id(args[position]) for position in writes}
        made = tuple(None if id(t) in already else self._new(t) for t in tree_iter(out) if isinstance(t, Tensor))
        self.steps.append(Step(func, arguments, keywords, made, written, reads))
        self.flops.append(_flops(func, args, kwargs, out))
        return out

    def _writes(self, func: Any, args: tuple, kwargs: dict) -> list[int]:
        """Positions of the arguments that the operation changes in place."""
        if not func._schema.is_mutable:
            return []
        positions = []
        for n, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            target = args[n] if n < len(args) else kwargs.get(argument.name)
            if not isinstance(target, Tensor):
                continue
            if id(target) not in self._values:
                self._refuse(
                    f"{func} changes what does not come from the input in place: a buffer, say, or a new tensor"
                )
            elif n >= len(args):
                self._refuse(f"{func} writes into a tensor that it is given by name; use its result")
            else:
                positions.append(n)
        return positions

    def _note_views(self, func: Any, args: tuple, kwargs: dict, given: list[Tensor], out: Any) -> None:
        parts = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        for n, part in enumerate(parts):
            storage = part.untyped_storage().data_ptr()
            parents = [t for t in given if part.numel() and t.untyped_storage().data_ptr() == storage]
            if not parents or parents[0] is part:
                continue
            if id(parents[0]) not in self._values:
                self._foreign.add(storage)
            elif len([t for t in given if id(t) in self._values]) == 1:
                parent = parents[0]
                template = tree_map(lambda a, parent=parent: _PARENT if a is parent else a, args)
                self._views[id(part)] = parent, _View(func, template, kwargs, n)

    def _behind_view(self, func: Any, args: tuple, writes: list[int]) -> tuple[_Rewritten, Tensor, list[Tensor]] | None:
        """Where an operation writes into what shares its memory: how to run it again, the first tensor of that memory,
        and all of them."""
        for position in writes:
            storage = args[position].untyped_storage().data_ptr()
            aliases = list(dict.fromkeys(self._storages[storage]))
            if len(aliases) == 1:
                continue
            chains = [self._chain(alias, aliases[0]) for alias in aliases]
            if len(writes) > 1 or storage in self._foreign or any(chain is None for chain in chains):
                self._refuse(f"{func} changes a view, or what has one, in place; use the operation out of place")
                return None
            for name, place in self.places.items():  # a patch of such a site would be no part of that memory
                if any(v is not None and id(self._kept[v.number]) in map(id, aliases[1:]) for v in place.outputs):
                    self._refuse(f"{func} changes in place what shares memory with {name}; choose the site before it")
                    return None
            where = next(n for n, alias in enumerate(aliases) if alias is args[position])
            return _Rewritten(func, position, where, tuple(chain or () for chain in chains)), aliases[0], aliases
        return None

    def _chain(self, alias: Tensor, root: Tensor) -> tuple[_View, ...] | None:
        """The views that lead from the root to an alias of its memory."""
        chain: list[_View] = []
        while alias is not root:
            if id(alias) not in self._views:
                return None
            alias, view = self._views[id(alias)]
            chain.append(view)
        return tuple(reversed(chain))

    def _refuse(self, why: str) -> None:
        """Keeps the first reason, with the innermost module that is running."""
        if self.refusal:
            return
        frame = sys._getframe(1)
        while frame is not None:
            running = frame.f_locals.get("self")
            if isinstance(running, nn.Module) and (name := self._names.get(id(running))) is not None:
                self.refusal = f"module: in {name or 'it'} ({type(running).__name__}), {why}"
                return
            frame = frame.f_back
        self.refusal = f"module: {why}"


def _draws(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether the operation draws random numbers: attention, say, only does with dropout."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = {a.name: a.default_value for a in func._schema.arguments}
    given |= dict(zip(given, args, strict=False)) | dict(kwargs)
    return given.get("dropout_p") != 0 and not any(given.get(name) is False for name in ("train", "training"))


def _flops(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """Operations of a product or convolution, as torch's counter has them; 0 for all else."""
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
