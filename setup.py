"""Packages, the CUDA sources as package data, and the CPU extension on LibTorch's stable ABI.

The extension is optional: without a C++ compiler the install succeeds, and ``fastsd info`` says what is missing.
"""

import os
import shlex
import sys

from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

COMPILE_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
]
EXTRA_FLAGS = shlex.split(os.environ.get("FASTSD_EXTRA_CFLAGS", ""))  # the tests build with sanitizers


class OptionalBuildExtension(BuildExtension):
    """Builds what the compiler at hand can build."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            print(f"fastsd: the CPU kernels were not built: {error}", file=sys.stderr)


cpu_extension = CppExtension(
    "fastsd_kernels._cpu",
    [
        f"csrc/cpu/{name}.cpp"
        for name in (
            "bindings",
            "group_norm_silu",
            "conv2d",
            "attention",
            "gri_attention",
            "linear",
            "digest",
            "memory",
        )
    ],
    define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
    extra_compile_args=COMPILE_FLAGS + EXTRA_FLAGS,
    extra_link_args=EXTRA_FLAGS,
    py_limited_api=True,
)

setup(
    packages=[
        *find_packages(include=["fastsd", "fastsd.*"]),
        *find_packages("kernels", include=["fastsd_kernels", "fastsd_kernels.*"]),
        "fastsd_kernels.cuda_sources",
    ],
    package_dir={
        "fastsd": "fastsd",
        "fastsd_kernels": "kernels/fastsd_kernels",
        "fastsd_kernels.cuda_sources": "csrc/cuda",
    },
    package_data={
        "fastsd_kernels": ["*.json", "conv2d/*.json", "py.typed"],
        "fastsd_kernels.cuda_sources": ["*.cu", "*.cuh"],
        "fastsd": ["py.typed"],
    },
    ext_modules=[cpu_extension],
    cmdclass={"build_ext": OptionalBuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
