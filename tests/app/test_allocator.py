"""The command line keeps freed pages in its own process, seen from outside: where a large block comes from."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

glibc = pytest.mark.skipif(
    not (sys.platform.startswith("linux") and hasattr(os, "confstr") and "CS_GNU_LIBC_VERSION" in os.confstr_names),
    reason="needs glibc",
)
# Prints where malloc would take a large block from when torch is about to be imported, and at the end.
PROBE = """
import ctypes, sys
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]

def probe(moment):
    block = libc.malloc(200 << 20)
    top = libc.sbrk(0)
    on_the_heap = block < top and top - block < 400 << 20
    libc.free(block)
    print(moment, "kept" if on_the_heap and libc.sbrk(0) == top else "returned", file=sys.stderr)

class Watcher:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            probe("torch")

sys.meta_path.insert(0, Watcher())
"""
COMMAND = "from btinet.cli import main; sys.argv[1:] = ['backends']; code = main(); probe('end'); sys.exit(code)"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "BTINET_", "GLIBC_", "LD_PRELOAD"))}
    command = [sys.executable, "-c", PROBE + code]
    return subprocess.run(command, env=ours | environment, capture_output=True, text=True, cwd="/")


@glibc
def test_the_command_line_keeps_pages_before_torch_is_imported() -> None:
    done = python(COMMAND)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == ["torch", "kept", "end", "kept"]


@glibc
def test_the_installed_command_does_it_too() -> None:
    script = Path(sys.executable).with_name("btinet")
    if not script.exists():
        pytest.skip("the console script is not installed beside this Python")
    run = f"try: runpy.run_path({str(script)!r}, run_name='__main__')"
    code = f"sys.argv[:] = ['btinet', 'backends']; import runpy\n{run}"
    done = python(f"{code}\nexcept SystemExit: probe('end')")
    assert done.stderr.split() == ["torch", "kept", "end", "kept"]


@glibc
@pytest.mark.parametrize(
    "environment",
    [
        {"BTINET_MALLOC": "system"},
        pytest.param({"MALLOC_ARENA_MAX": "2"}, marks=pytest.mark.slow),
        pytest.param({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, marks=pytest.mark.slow),
    ],
)
def test_what_the_user_says_about_memory_stays(environment: dict[str, str]) -> None:
    assert python(COMMAND, **environment).stderr.split() == ["torch", "returned", "end", "returned"]


@glibc
def test_a_preloaded_allocator_stays(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text(
        "#include <stddef.h>\nvoid *memalign(size_t, size_t);\n"
        "int posix_memalign(void **out, size_t align, size_t size) { return !(*out = memalign(align, size)); }\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    assert python(COMMAND, LD_PRELOAD=str(library)).stderr.split() == ["torch", "returned", "end", "returned"]


@glibc
@pytest.mark.parametrize(
    "code",
    [
        "import btinet_kernels, btinet.cli, btinet.models",
        "import btinet_kernels; from btinet.cli import main; main(['backends'])",  # a call from another program
    ],
)
def test_nobody_else_decides_for_the_process(code: str) -> None:
    assert python(f"{code}; probe('end')").stderr.split() == ["torch", "returned", "end", "returned"]


def test_another_value_is_refused() -> None:
    done = python(COMMAND, BTINET_MALLOC="jemalloc")
    assert done.stderr.splitlines()[0].startswith("btinet: error: BTINET_MALLOC='jemalloc': the only value is 'system'")
    assert "exit" not in done.stderr
    assert done.returncode == 2
