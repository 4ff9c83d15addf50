"""Builds csrc into btinet_kernels._cpu. Needs a C++17 compiler and pybind11; no torch, no GPU."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile("MAX_JOBS").install()

sources = ["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]

setup(
    ext_modules=[
        Pybind11Extension(
            "btinet_kernels._cpu",
            sources,
            depends=[str(path) for path in sorted(Path("csrc").rglob("*.h"))],
            cxx_std=17,
            # libgomp is linked by its plain name: importing torch first brings its copy of that name, and one
            # thread pool serves both. -fno-math-errno lets sqrt and abs loops vectorise; nothing reorders sums.
            extra_compile_args=[
                "-O3",
                "-fopenmp",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-ffp-contract=fast",
                "-Wall",
                "-Wextra",
            ],
            extra_link_args=["-fopenmp"],
        )
    ]
)
