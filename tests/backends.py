"""Every backend that must run on this machine, for the tests of the ops: one entry per C++ instruction set.

CUDA kernels run on a GPU where there is one, and else emulated: thread by thread on the CPU, from the same sources.
"""

import contextlib
import platform
from dataclasses import dataclass

import cuda_emulator
import pytest
import torch

from vaecirc_fast import _native, _registry


@dataclass(frozen=True)
class Backend:
    """A backend's name, the device of its tensors and, of C++, the instruction set."""

    name: str
    device: str
    instruction_set: str = ""

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter, which is slow."""
        return self.name == "triton" and self.device == "cpu"

    @property
    def emulated(self) -> bool:
        """Whether the CUDA kernels run thread by thread on the CPU, which is slow too."""
        return self.name == "cuda" and self.device == "cpu"

    def __str__(self) -> str:
        return "-".join(part for part in (self.name, self.instruction_set, self.device) if part)

    @contextlib.contextmanager
    def forced(self):
        """Every op runs on this backend, and C++ with this instruction set; restored afterwards."""
        before = _native.instruction_set()
        emulated = cuda_emulator.emulated() if self.emulated else contextlib.nullcontext()
        with _registry.backend(self.name), emulated:
            try:
                if self.instruction_set:
                    _native.cpp().set_instruction_set(self.instruction_set)
                yield self
            finally:
                if self.instruction_set:
                    _native.cpp().set_instruction_set(before)


CPP = [Backend("cpp", "cpu", name) for name in (_native.cpp().instruction_sets() if not _native.cpp_reason() else [""])]
# The C++ module must be there: without it its tests fail. Triton runs on a GPU, and where there is none interpreted.
ALL = [Backend("reference", "cpu"), *CPP]
if torch.cuda.is_available():
    ALL += [Backend("reference", "cuda"), *([] if _native.cuda_reason() else [Backend("cuda", "cuda")])]
    ALL += [Backend("triton", "cuda")]
elif platform.system() == "Linux":
    ALL += [Backend("cuda", "cpu"), Backend("triton", "cpu")]


def parameters(backends):
    """The backends as parameters of a test; those on a GPU carry the mark."""
    return [pytest.param(b, id=str(b), marks=[pytest.mark.gpu] * (b.device == "cuda")) for b in backends]


# For tests in which the instruction set does not matter: the fixture `backend` then goes through C++ once.
one_of_each = pytest.mark.parametrize("backend", parameters([b for b in ALL if b not in CPP[:-1]]), indirect=True)
