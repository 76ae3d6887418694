"""Compiles Triton kernels for GPUs that are not at hand, as the launch functions call them, and reads the machine code.

A kernel file declares calls of its launch functions in a dict GATE: name -> (call, instructions that the machine code
must hold). The calls are recorded, not run: so what is compiled has the types, constants and options of a real launch.
An instruction "90:HGMMA" is wanted on compute capability 9.0 only.

Run as a program (`compile_gate.py CAPABILITY FILE ...`, without TRITON_INTERPRET) it compiles every recorded launch and
prints a JSON line when it starts one and when it is done; `compiled` runs it and watches the time.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

KERNELS = Path(__file__).parents[1] / "triton_kernels"
SECONDS = 60  # for one compile, on a slow and busy machine
POINTERS = {
    **{"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "float64": "*fp64", "bool": "*i1"},
    **{"uint8": "*u8", "int8": "*i8", "int16": "*i16", "int32": "*i32", "int64": "*i64"},
}


@dataclass
class Launch:
    """One launch of a kernel: in which case of GATE, of which function, with what."""

    case: str
    kernel: str
    instructions: tuple[str, ...]
    arguments: dict[str, Any]  # by parameter name
    options: dict[str, Any]  # num_warps and the like

    @property
    def name(self) -> str:
        return f"{self.case} ({self.kernel})"


@dataclass
class Compiled:
    """What a launch compiled to, or the error."""

    name: str
    instructions: tuple[str, ...]
    capability: int
    resources: dict[str, int] = field(default_factory=dict)  # REG, STACK, SHARED, LOCAL
    sass: str = ""
    error: str = ""

    def faults(self) -> list[str]:
        """Why this kernel must not be shipped; empty if it may."""
        if self.error:
            return [self.error]
        found = [f"{what} is {self.resources[what]} bytes" for what in ("STACK", "LOCAL") if self.resources[what]]
        found += [f"spills: the machine code holds {op}" for op in ("STL", "LDL") if _holds(self.sass, op)]
        for wanted in self.instructions:
            capability, _, op = wanted.rpartition(":")
            if capability in ("", str(self.capability)) and not _holds(self.sass, op):
                found.append(f"the machine code has no {op}")
        return found


def _holds(sass: str, instruction: str) -> bool:
    # Whole parts of a name: LDG.E.128 is found in LDG.E.128.CONSTANT, and LD is not in LDG.
    names = (word.strip(";") for word in sass.split() if word[:1].isupper())
    return any(f"{name}.".startswith(f"{instruction}.") for name in names)


# --- what is launched ------------------------------------------------------------------------------------------------


def load(file: Path) -> ModuleType:
    """The module of a kernel file: of the installed package, or any other file."""
    if file.parent == KERNELS:
        return importlib.import_module(f"vaecirc_fast.triton_kernels.{file.stem}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernels(file: Path) -> set[str]:
    """The @triton.jit functions of a file that none of its others calls: those that are launched."""
    functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    jitted = [f for f in functions if any(ast.unparse(d).startswith("triton.jit") for d in f.decorator_list)]
    called = {
        call.func.id
        for function in jitted
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    }
    return {function.name for function in jitted} - called


def launches(file: Path) -> list[Launch]:
    """Every launch that the calls of the file's GATE make."""
    module = load(file)
    recorded: list[Launch] = []
    originals = {name: getattr(module, name) for name in kernels(file)}
    for case, (call, instructions) in getattr(module, "GATE", {}).items():
        for name, kernel in originals.items():
            setattr(module, name, _Recorder(case, kernel, tuple(instructions), recorded))
        try:
            with FakeTensorMode():  # tensors "on cuda" without a GPU
                call()
        finally:
            for name, kernel in originals.items():
                setattr(module, name, kernel)
    return recorded


@dataclass
class _Recorder:
    """Stands for a kernel: `recorder[grid](...)` notes the arguments."""

    case: str
    kernel: Any
    instructions: tuple[str, ...]
    recorded: list[Launch]

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._note

    def _note(self, *arguments: Any, **named: Any) -> None:
        names = self.kernel.arg_names
        bound = dict(zip(names, arguments, strict=False)) | {k: v for k, v in named.items() if k in names}
        options = {k: v for k, v in named.items() if k not in names}
        self.recorded.append(Launch(self.case, self.kernel.fn.__name__, self.instructions, bound, options))


def missing(file: Path) -> str:
    """What a kernel file lacks in its GATE, told so that one can add it; empty if nothing."""
    uncovered = sorted(kernels(file) - {launch.kernel for launch in launches(file)})
    if not uncovered:
        return ""
    return (
        f"{file.name}: no case of GATE launches {', '.join(uncovered)}. Add one to the file for each way in which its "
        'launch function is called: GATE = {"what is special": (lambda: forward(torch.empty(..., device="cuda"), ...), '
        '("LDG.E.128",))}, the instructions being those that the machine code must hold.'
    )


# --- compiling -------------------------------------------------------------------------------------------------------


def _compile(module: ModuleType, launch: Launch, capability: int) -> bytes:
    """The cubin. The one place that speaks to Triton's compiler (3.6 to 3.9)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(module, launch.kernel)
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(function.params):
        value = launch.arguments.get(parameter.name, parameter.default)
        kind = "constexpr" if parameter.is_constexpr else _type(value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif _whole_sixteens(value):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    return compiled.asm["cubin"]


def _type(value: Any) -> str:
    """The type of a run-time argument as Triton's launcher would name it; ones and None are constants to it."""
    if value is None or (type(value) is int and value == 1):
        return "constexpr"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    return POINTERS[str(value.dtype).removeprefix("torch.")]


def _whole_sixteens(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and value % 16 == 0
    # torch's own memory starts at whole sixteens.
    return hasattr(value, "dtype") and value.storage_offset() * value.element_size() % 16 == 0


def main(capability: int, files: list[Path]) -> None:
    """Compile every launch; one JSON line before and one after each."""
    for file in files:
        module = load(file)
        for launch in launches(file):
            print(json.dumps({"start": launch.name, "instructions": launch.instructions}), flush=True)
            try:
                print(json.dumps(_read(_compile(module, launch, capability))), flush=True)
            except Exception as error:  # whatever the compiler raises is the result
                cause = f" {error.__cause__}" if error.__cause__ else ""
                print(json.dumps({"error": f"{type(error).__name__}: {error}{cause}"[:2000]}), flush=True)


def tool(name: str) -> Path:
    """cuobjdump or nvdisasm, as Triton brings them."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def read_resources(text: str) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the line that cuobjdump -res-usage prints for a kernel."""
    line = next(line for line in text.splitlines() if "STACK:" in line)
    pairs = (word.split(":") for word in line.split() if word.split(":")[0] in ("REG", "STACK", "SHARED", "LOCAL"))
    return {name: int(value) for name, value in pairs}


def _read(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.cubin"
        file.write_bytes(cubin)
        environment = {**os.environ, "PATH": f"{tool('nvdisasm').parent}:{os.environ.get('PATH', '')}"}

        def dump(what: str) -> str:
            command = [str(tool("cuobjdump")), what, str(file)]
            return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

        return {"resources": read_resources(dump("-res-usage")), "sass": dump("-sass")}


# --- watching --------------------------------------------------------------------------------------------------------


def compiled(capability: int, files: list[Path], seconds: float = SECONDS) -> list[Compiled]:
    """Every launch of the files, compiled in a process of its own; one that takes longer than `seconds` is an error."""
    results: list[Compiled] = []
    with tempfile.TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = cache  # so that everything is compiled, by this Triton
        command = [sys.executable, __file__, str(capability), *map(str, files)]
        errors = Path(cache) / "errors"  # a pipe that nobody reads would fill up
        with (
            errors.open("w") as e,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=e, text=True, env=environment) as p,
        ):
            try:
                for line in _lines(p, max(seconds, SECONDS), seconds):
                    message = json.loads(line)
                    if "start" in message:
                        error = "its compiler did not finish"
                        new = Compiled(message["start"], tuple(message["instructions"]), capability, error=error)
                        results.append(new)
                    else:
                        last = results[-1]
                        last.error, last.sass = message.get("error", ""), message.get("sass", "")
                        last.resources = message.get("resources", {})
            except TimeoutError:
                if results:
                    results[-1].error = f"not compiled in {seconds:g} s"
                else:
                    raise
            finally:
                p.kill()
        failure = errors.read_text()
    if not results:
        raise RuntimeError(f"nothing was compiled for sm_{capability}:\n{failure[-2000:]}")
    return results


def _lines(process: subprocess.Popen, first: float, others: float) -> Iterator[str]:
    """The lines a process prints; TimeoutError if the next takes too long."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    limit = first
    while True:
        try:
            line = lines.get(timeout=limit)
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return
        yield line
        limit = others


if __name__ == "__main__":
    main(int(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
