# Build of the native module: each kernel file once per instruction set, plus the mapping of triton_kernels into the
# package.
import os
import platform

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

KERNELS = ["csrc/cpu/effect_reduction.cpp"]
FLAGS = ["-O3", "-std=gnu++17", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
# _native.py picks the widest set this processor has. Other architectures get the baseline alone.
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        *INSTRUCTION_SETS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512cd", "-mprefer-vector-width=512"),
    ]


class BuildKernels(build_ext):
    """Compiles every kernel for every instruction set and links the objects into the one module."""

    def build_extension(self, ext):
        for name, flags in INSTRUCTION_SETS.items():
            ext.extra_objects += self.compiler.compile(
                KERNELS,
                output_dir=os.path.join(self.build_temp, name),
                macros=[("VAECIRC_ISA", name)],
                include_dirs=["csrc"],
                extra_postargs=[*FLAGS, *flags],
                depends=ext.depends,
            )
        super().build_extension(ext)


setup(
    packages=[*find_packages(include=["vaecirc_fast*"]), "vaecirc_fast.triton_kernels"],
    package_dir={"vaecirc_fast.triton_kernels": "triton_kernels"},
    ext_modules=[
        Pybind11Extension(
            "vaecirc_fast._C",
            ["csrc/bindings_cpu.cpp"],
            include_dirs=["csrc"],
            depends=["csrc/common.h", "csrc/cpu/effect_reduction.h", *KERNELS],
            define_macros=[("VAECIRC_" + name.upper(), 1) for name in INSTRUCTION_SETS],
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
