"""Builds csrc into btinet_kernels._cpu and, where nvcc is found, btinet_kernels._cuda.

Needs a C++17 compiler and pybind11; no torch, no GPU. BTINET_CUDA=0 leaves the CUDA part out;
BTINET_PTXAS_VERBOSE=1 prints registers and spills of every kernel.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ParallelCompile("MAX_JOBS").install()

CUDA_ARCHITECTURES = (80, 90, 100)
headers = [str(path) for path in sorted(Path("csrc").rglob("*.h")) + sorted(Path("csrc").rglob("*.cuh"))]


def find_nvcc() -> str | None:
    if os.environ.get("BTINET_CUDA") == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


nvcc = find_nvcc()


def cuda_libraries(nvcc: str) -> list[str]:
    """Folders of the toolkit that hold the static runtime; nvcc says where the toolkit is."""
    said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = next((line.split("=", 1)[1].strip() for line in said.splitlines() if "TOP=" in line), None)
    folders = [f"{top}/lib64", f"{top}/lib", f"{top}/targets/x86_64-linux/lib", f"{top}/targets/sbsa-linux/lib"]
    return [folder for folder in folders if Path(folder, "libcudart_static.a").exists()]


def nvcc_flags(nvcc: str) -> list[str]:
    """Machine code for every architecture that this nvcc knows, and PTX of the last for those to come."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    served = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch}" in known]
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-Wall,-Wextra", "--threads", "0"]
    for arch in served:
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    flags += ["-gencode", f"arch=compute_{served[-1]},code=compute_{served[-1]}"]
    return flags + ["-Xptxas", "-v"] * (os.environ.get("BTINET_PTXAS_VERBOSE") == "1")


class BuildExtensions(build_ext):
    """Compiles the .cu files of an extension with nvcc before the rest of it."""

    def build_extension(self, ext: Extension) -> None:
        sources = [source for source in ext.sources if source.endswith(".cu")]
        if sources:
            ext.sources = [source for source in ext.sources if source not in sources]
            ext.extra_objects += self.compile_cuda(sources)
        super().build_extension(ext)

    def compile_cuda(self, sources: list[str]) -> list[str]:
        def compile_one(source: str) -> str:
            target = Path(self.build_temp, source).with_suffix(".cu.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            print(f"nvcc {source}", flush=True)
            subprocess.run([nvcc, *flags, "-c", source, "-o", str(target)], check=True)
            return str(target)

        try:
            flags = nvcc_flags(nvcc)
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            with ThreadPoolExecutor(jobs) as pool:
                return list(pool.map(compile_one, sources))
        except (OSError, subprocess.CalledProcessError, IndexError) as error:
            # The extension is optional: setuptools prints this as a warning and leaves it out.
            raise CompileError(f"btinet_kernels is built without its CUDA part: {error}") from error


extensions = [
    Pybind11Extension(
        "btinet_kernels._cpu",
        ["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
        depends=headers,
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

if nvcc:
    extensions.append(
        Pybind11Extension(
            "btinet_kernels._cuda",
            ["csrc/bindings_cuda.cpp", *sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))],
            depends=headers,
            cxx_std=17,
            optional=True,
            extra_compile_args=["-O2", "-Wall", "-Wextra"],
            library_dirs=cuda_libraries(nvcc),
            libraries=["cudart_static", "dl", "rt", "pthread"],
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtensions})
