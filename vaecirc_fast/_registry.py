"""One row an op: which backends have a kernel for it, and which kernel a call gets.

The rule is here and nowhere else: `auto` takes the first available kernel in the row's order for the tensor's device
and dtype; a backend chosen by `vf.backend(name)` or VAECIRC_BACKEND must be able to run, or the call is an error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .errors import BackendError, InputError

if TYPE_CHECKING:
    import pandas

BACKENDS = ("reference", "cpp", "triton", "cuda")


@dataclass(frozen=True)
class Kernel:
    """One cell of a row: `load()` imports the functions when first needed; `reason(device)` is None if it can run."""

    load: Callable[[], Mapping[str, Callable]]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    reason: Callable[[str], str | None]

    def why_not(self, device: str, dtype: torch.dtype | None = None) -> str | None:
        """Why this kernel cannot run on `device` (with `dtype`), or None."""
        if device not in self.devices:
            return f"has no kernel for {device}"
        if dtype is not None and dtype not in self.dtypes:
            return f"has no kernel for {dtype}"
        return self.reason(device)


@dataclass(frozen=True)
class Absent:
    """A cell left empty on purpose, and why."""

    why: str


@dataclass(frozen=True)
class Row:
    """An op: a kernel or a reason per backend, and the measured order of preference per device type."""

    name: str
    cells: Mapping[str, Kernel | Absent]
    order: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if set(self.cells) != set(BACKENDS):
            raise ValueError(f"row {self.name}: needs a cell for each of {BACKENDS}")
        rows[self.name] = self

    def why_not(self, backend: str, device: str, dtype: torch.dtype | None = None) -> str | None:
        """Why `backend` cannot run this op here, or None."""
        cell = self.cells[backend]
        return cell.why if isinstance(cell, Absent) else cell.why_not(device, dtype)

    def choose(self, device: str, dtype: torch.dtype | None = None) -> str:
        """The backend for tensors of `dtype` on `device`; BackendError if the forced one cannot run."""
        forced = _forced.get()
        if forced is None:
            forced = _from_environment()
        if forced != "auto":
            why = self.why_not(forced, device, dtype)
            if why is not None:
                raise BackendError(f"{self.name}: backend {forced!r} was asked for but {why}")
            return forced
        for backend in self.order.get(device, ("reference",)):
            if self.why_not(backend, device, dtype) is None:
                return backend
        raise BackendError(f"{self.name}: no backend runs on {device} with {dtype}")

    def function(self, name: str, tensor: torch.Tensor) -> Callable:
        """The function `name` of the kernel chosen for `tensor`."""
        cell = self.cells[self.choose(tensor.device.type, tensor.dtype)]
        assert isinstance(cell, Kernel)
        return cell.load()[name]


rows: dict[str, Row] = {}
_forced: ContextVar[str | None] = ContextVar("vaecirc_backend", default=None)


def _from_environment() -> str:
    return _checked(os.environ.get("VAECIRC_BACKEND") or "auto", "VAECIRC_BACKEND")


def _checked(name: str, where: str) -> str:
    if name not in ("auto", *BACKENDS):
        raise InputError(f"{where}: backend {name!r} is unknown; known: auto, {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within this context every op runs on backend `name`: "auto", "reference", "cpp", "triton" or "cuda".

    An op whose forced backend cannot run raises BackendError; nothing falls back silently. The default outside any
    context is the environment variable VAECIRC_BACKEND, else "auto".
    """
    token = _forced.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The backend that this context forces, or None.

    A gradient takes its forward's: autograd runs the gradients of GPU tensors in a thread that no context reaches.
    """
    return _forced.get()


def backends() -> pandas.DataFrame:
    """One line per op and backend: `available` here, `chosen_for` which devices, and `why_not` otherwise."""
    import pandas

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = []
    for row in rows.values():
        chosen = {}
        for device in devices:
            with contextlib.suppress(BackendError):
                chosen[device] = row.choose(device)
        for name in BACKENDS:
            why = {device: row.why_not(name, device) for device in devices}
            lines.append(
                {
                    "op": row.name,
                    "backend": name,
                    "available": any(reason is None for reason in why.values()),
                    "chosen_for": ", ".join(d for d in devices if chosen.get(d) == name),
                    "why_not": "; ".join(f"{d}: {r}" for d, r in why.items() if r) if any(why.values()) else "",
                }
            )
    return pandas.DataFrame(lines)


def always(device: str) -> None:
    """`reason` of a kernel that runs wherever its devices are."""
    return None


def cpp_reason(device: str) -> str | None:
    """`reason` of C++ kernels."""
    from . import _native

    return _native.cpp_reason()


def cuda_reason(device: str) -> str | None:
    """`reason` of CUDA kernels."""
    from . import _native

    return _native.cuda_reason()


def triton_reason(device: str) -> str | None:
    """`reason` of Triton kernels: a GPU, or the interpreter on CPU tensors."""
    try:
        import triton
    except ImportError as error:
        return f"Triton is not installed ({error}): run `pip install triton`"
    # Decided when Triton was imported, so the environment may say something else by now.
    interpreted = not isinstance(triton.language.sum, triton.runtime.JITFunction)
    if device == "cpu" and not interpreted:
        return "Triton runs on CPU tensors only in its interpreter: set TRITON_INTERPRET=1 before the first import"
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None
