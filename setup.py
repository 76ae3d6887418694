# Build of the native modules: _C, each kernel file once per instruction set; _C_cuda, where nvcc is found; plus the
# mapping of triton_kernels into the package. VAECIRC_CUDA=0 leaves _C_cuda out, =1 makes it an error that it cannot be
# built.
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import CompileError

OPS = [
    "boosted_importance",
    "direct_edges",
    "effect_reduction",
    "histogram_mi",
    "latent_sweep",
    "patch_mix",
    "render_scene",
    "render_sprites",
    "sparse_adam",
    "sparse_decode",
    "tc_logsumexp",
    "threshold_encode",
    "topk",
    "topk_encode",
    "vq_assign",
]  # with a C++ kernel
KERNELS = [f"csrc/cpu/{name}.cpp" for name in [*OPS, "network_rows"]]
SHARED = ["activations", "effect_rows", "network_rows", "panels", "registers", "topk_select"]  # headers
HEADERS = ["csrc/common.h", "csrc/sparse_entries.h", *(f"csrc/cpu/{name}.h" for name in [*SHARED, *OPS])]
FLAGS = ["-O3", "-std=gnu++17", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
# _native.py picks the widest set this processor has. Other architectures get the baseline alone.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        *INSTRUCTION_SETS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512cd", "-mprefer-vector-width=512"),
    ]
CUDA = os.environ.get("VAECIRC_CUDA", "auto")
CUDA_KERNELS = ["csrc/cuda/device.cu", "csrc/cuda/effect_reduction.cu"]
CUDA_HEADERS = ["csrc/cuda/device.h", "csrc/cuda/device.cuh", "csrc/cuda/effect_reduction.cuh"]
CUDA_FLAGS = ["-O3", "-std=c++17", "--threads", "2", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_ARCHITECTURES = (80, 90, 100)  # as far as this nvcc knows them; others run the PTX of the newest


def find_nvcc():
    """nvcc under CUDA_HOME, on the PATH or of NVIDIA's pip packages, or None."""
    packages = Path(sysconfig.get_path("purelib"), "nvidia")
    found = [Path(os.environ["CUDA_HOME"], "bin", "nvcc")] if "CUDA_HOME" in os.environ else []
    found += [Path(shutil.which("nvcc") or ""), *packages.glob("*/bin/nvcc"), *packages.glob("*/*/bin/nvcc")]
    return next((str(nvcc) for nvcc in found if nvcc.is_file()), None)


def call_nvcc(*arguments):
    """What nvcc prints; CompileError with its first error if it fails."""
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CompileError(f"nvcc: {next((line for line in lines if 'error' in line), lines[-1])}")
    return done.stdout


class BuildKernels(build_ext):
    """Compiles the kernels and links them into their modules."""

    def run(self):
        if self.inplace or self.editable_mode:  # an old module must not stand in for one that is not built now
            Path("vaecirc_fast", self.get_ext_filename("_C_cuda")).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext):
        (self._add_cuda_kernels if ext.name == "vaecirc_fast._C_cuda" else self._add_cpu_kernels)(ext)
        super().build_extension(ext)

    def _add_cuda_kernels(self, ext):
        nvcc = find_nvcc()
        if nvcc is None:
            raise CompileError("no nvcc under CUDA_HOME, on the PATH or in NVIDIA's pip packages (nvidia-cuda-nvcc)")
        known = call_nvcc(nvcc, "--list-gpu-code")
        names = [str(n) for n in CUDA_ARCHITECTURES if f"sm_{n}\n" in known]
        if not names:
            raise CompileError(f"{nvcc} knows none of sm_{', sm_'.join(map(str, CUDA_ARCHITECTURES))}")
        targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in names]
        targets.append(f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}")
        for source in CUDA_KERNELS:
            # Kept from build to build: nvcc takes half a minute, and its output depends on nothing but this.
            read = [call_nvcc(nvcc, "--version"), *targets, *CUDA_FLAGS, source]
            read += [Path(file).read_text() for file in (source, *CUDA_HEADERS)]
            key = hashlib.sha256("\n".join(read).encode()).hexdigest()[:16]
            compiled = Path("build", "cuda", f"{Path(source).stem}-{key}.o")
            if not compiled.exists():
                compiled.parent.mkdir(parents=True, exist_ok=True)
                part = compiled.with_suffix(f".{os.getpid()}.o")
                call_nvcc(nvcc, *CUDA_FLAGS, *targets, "-c", source, "-o", str(part))
                part.replace(compiled)
            ext.extra_objects.append(str(compiled))
        built = ", ".join([*(f"sm_{n}" for n in names), f"compute_{names[-1]}"])
        ext.define_macros.append(("VAECIRC_CUDA_ARCHITECTURES", f'"{built}"'))
        # The runtime is linked in, so the module needs no CUDA library; nvcc says where its toolkit is.
        here = re.search(r"_HERE_=(.*)", call_nvcc(nvcc, "--dryrun", "-x", "cu", os.devnull))
        toolkit = Path(here.group(1) if here else nvcc).parent
        ext.library_dirs += [str(toolkit / "lib64"), str(toolkit / "lib"), *map(str, toolkit.glob("targets/*/lib"))]
        ext.libraries += ["cudart_static", "rt", "dl", "pthread"]

    def _add_cpu_kernels(self, ext):
        for name, flags in INSTRUCTION_SETS.items():
            ext.extra_objects += self.compiler.compile(
                KERNELS,
                output_dir=os.path.join(self.build_temp, name),
                macros=[("VAECIRC_ISA", name)],
                include_dirs=["csrc"],
                extra_postargs=[*FLAGS, *flags],
                depends=ext.depends,
            )


extensions = [
    Pybind11Extension(
        "vaecirc_fast._C",
        ["csrc/bindings_cpu.cpp"],
        include_dirs=["csrc"],
        depends=[*HEADERS, *KERNELS],
        define_macros=[("VAECIRC_" + name.upper(), 1) for name in INSTRUCTION_SETS],
        extra_compile_args=FLAGS,
        extra_link_args=["-fopenmp"],
    )
]
if CUDA == "1" or (CUDA != "0" and find_nvcc()):
    extensions.append(
        Pybind11Extension(
            "vaecirc_fast._C_cuda",
            ["csrc/bindings_cuda.cpp"],
            include_dirs=["csrc"],
            depends=[*CUDA_HEADERS, *CUDA_KERNELS],
            optional=CUDA != "1",  # then a failure is a warning
        )
    )

setup(
    packages=[*find_packages(include=["vaecirc_fast*"]), "vaecirc_fast.triton_kernels"],
    package_dir={"vaecirc_fast.triton_kernels": "triton_kernels"},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildKernels},
)
