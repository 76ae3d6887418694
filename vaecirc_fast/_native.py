"""Finds the compiled modules `_C` (CPU) and `_C_cuda`; where one is missing, says which command builds it.

The instruction set is the widest that runs here; VAECIRC_ISA=baseline|avx2|avx512 overrides it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from types import ModuleType

import torch  # loads libgomp first: _C then shares its threads instead of bringing a second runtime

from .errors import BackendError

BUILD_COMMAND = "pip install -e ."
CUDA_BUILD_COMMAND = "VAECIRC_CUDA=1 pip install -e ."
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# A forked child that starts a second thread would wait for ever on the parent's thread pool.
_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_mark_forked)


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from . import _C  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        return None, f"the C++ module is not built ({error}): run `{BUILD_COMMAND}` in the source tree"
    wanted = os.environ.get("VAECIRC_ISA")
    names = _C.instruction_sets()
    if wanted and wanted not in names:
        raise BackendError(
            f"VAECIRC_ISA={wanted}: not built or not supported by this processor; available: {', '.join(names)}"
        )
    _C.set_instruction_set(wanted or names[-1])
    return _C, None


_module, _reason = _load()


def cpp_reason() -> str | None:
    """Why the C++ backend cannot run, or None if it can."""
    return _reason


def cpp() -> ModuleType:
    """The module `_C`; BackendError with the build command where it is missing."""
    if _module is None:
        raise BackendError(str(_reason))
    return _module


@functools.cache
def _load_cuda() -> tuple[ModuleType | None, str | None]:
    # Imported when first asked for: CUDA itself starts only once the module is asked for devices.
    try:
        from . import _C_cuda  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        return None, f"the CUDA module is not built ({error}): run `{CUDA_BUILD_COMMAND}` in the source tree, with nvcc"
    return _C_cuda, None


def cuda_build() -> str:
    """What the CUDA module was built for, or why there is none."""
    module, reason = _load_cuda()
    return str(reason) if module is None else f"built for {module.architectures}"


def cuda_reason() -> str | None:
    """Why the CUDA backend cannot run, or None if it can."""
    module, reason = _load_cuda()
    if module is None:
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device" + (f": {module.device_error()}" if not module.device_count() else "")
    return module.device_error() or None


def cuda() -> ModuleType:
    """The module `_C_cuda`; BackendError with the build command where it is missing."""
    module, reason = _load_cuda()
    if module is None:
        raise BackendError(str(reason))
    return module


def cuda_place(tensor: torch.Tensor) -> tuple[int, int]:
    """The device's number and torch's current stream on it, where a kernel on `tensor` is to run."""
    stream = torch.cuda.current_stream(tensor.device)
    return stream.device.index, stream.cuda_stream


def address(tensor: torch.Tensor | None) -> int:
    """Of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def threads(elements: int) -> int:
    """Threads for a kernel over `elements` elements: torch's number, or one for tiny inputs and in forked children."""
    return 1 if _forked or elements < 1 << 18 else torch.get_num_threads()


def processor() -> str:
    """The processor's name, as its maker gives it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """The instruction set that C++ kernels use here, or "none" where they are not built."""
    return _module.instruction_set() if _module is not None else "none"
