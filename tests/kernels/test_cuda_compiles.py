"""nvcc takes every CUDA source for every architecture, and no kernel spills registers or keeps a stack frame."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
CASES = [(path.name, arch) for path in sorted(SOURCES.glob("*.cu")) for arch in ("80", "90", "100")]
KERNEL = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers.*?(?P<shared>\d+) bytes smem",
    re.DOTALL,
)


def short(symbol: str) -> str:
    kernel = re.search(r"\d+([a-z_]+_kernel)(?:I(.*?)EEv)?", symbol)
    assert kernel, symbol
    arguments = kernel[2] or ""
    names = {"13__nv_bfloat16": "bfloat16", "6__half": "float16", "f": "float32"}
    dtype = next((name for mangled, name in names.items() if arguments.startswith(mangled)), "")
    variant = re.search(r"Lb([01])E?$", arguments)
    return " ".join(filter(None, (kernel[1], dtype, f"variant {variant[1]}" if variant else "")))


@pytest.mark.slow
@pytest.mark.parametrize(("source", "arch"), CASES)
def test_no_kernel_spills(source: str, arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc on PATH")
    if f"sm_{arch}" not in subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra,-Werror"]
    code = ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    result = subprocess.run(
        [nvcc, *flags, *code, "-c", str(SOURCES / source), "-o", str(tmp_path / "object.o")],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    kernels = [match.groupdict() for match in KERNEL.finditer(result.stdout + result.stderr)]
    assert len(kernels) == (result.stdout + result.stderr).count("Compiling entry function") > 0
    with capsys.disabled():
        print(f"\n{source} for sm_{arch}")
        for kernel in kernels:
            print(
                f"  {short(kernel['symbol']):<42}{kernel['registers']:>4} registers {kernel['shared']:>6} B shared, "
                f"{kernel['stores']} + {kernel['loads']} B spilled"
            )
    for kernel in kernels:
        assert (kernel["stack"], kernel["stores"], kernel["loads"]) == ("0", "0", "0"), short(kernel["symbol"])
