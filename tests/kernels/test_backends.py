"""Which backend serves, what is said when one cannot, and what importing does not do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import btinet_kernels
from btinet_kernels import BackendError, backends, fused_tim, use_backend
from btinet_kernels.backends import choose, instruction_set
from btinet_kernels.nn import TaskInteractionModule


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, cwd="/"
    )


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    report = backends()
    assert set(report) == {"fused_tim", "fused_upa", "fused_task_interaction", "fused_squeeze_excite"}
    assert report["fused_tim"]["native"].startswith("serves CPU tensors")
    assert "fused_upa" in capsys.readouterr().out
    with use_backend("reference"):
        assert "'reference' was asked for" in backends(verbose=False)["fused_tim"]["native"]


def test_auto_takes_what_can_serve() -> None:
    assert choose("fused_tim", torch.zeros(2, 3, 4)) == "native"
    assert choose("fused_tim", torch.zeros(2, 3, 4, dtype=torch.float16)) == "reference"
    assert choose("fused_tim", torch.zeros(2, 3, 4, device="meta")) == "reference"


def test_a_backend_asked_for_by_name_serves_or_raises() -> None:
    module = TaskInteractionModule(4, 5)
    with use_backend("native"), pytest.raises(BackendError, match="float32, float64 and bfloat16 only"):
        module(torch.zeros(2, 4, 3, dtype=torch.float16), torch.zeros(2, 5))
    with pytest.raises(BackendError, match="no backend 'cudnn'"), use_backend("cudnn"):
        pass
    with use_backend("reference"):
        assert choose("fused_tim", torch.zeros(2, 3, 4)) == "reference"
    assert choose("fused_tim", torch.zeros(2, 3, 4)) == "native"


def test_environment_variable() -> None:
    code = "import torch; from btinet_kernels.backends import choose; print(choose('fused_tim', torch.zeros(2, 3, 4)))"
    assert python(code, BTINET_BACKEND="reference").stdout.strip() == "reference"
    assert python(code).stdout.strip() == "native"
    wrong = python(code, BTINET_BACKEND="fast")
    assert "BTINET_BACKEND: there is no backend 'fast'; choose auto, native, triton, cuda or reference." in wrong.stderr


def test_without_the_compiled_part_the_reference_serves_and_says_why() -> None:
    code = """
import sys
sys.modules["btinet_kernels._cpu"] = None
import torch, btinet_kernels
from btinet_kernels.nn import TaskInteractionModule
print(TaskInteractionModule(4, 5)(torch.zeros(2, 4, 3), torch.zeros(2, 5))[0].shape)
print(btinet_kernels.backends(verbose=False)["fused_tim"]["native"])
try:
    with btinet_kernels.use_backend("native"):
        pass
except btinet_kernels.BackendError as error:
    print("refused:", error)
"""
    out = python(code).stdout
    assert "torch.Size([2, 4, 3])" in out
    assert out.count("the compiled part is missing") == 2
    assert "refused: use_backend('native')" in out


@pytest.mark.parametrize("name", ["avx2", "portable"])
def test_lesser_instruction_sets_compute_the_same(name: str) -> None:
    code = """
import torch
from btinet_kernels import use_backend
from btinet_kernels.backends import instruction_set
from btinet_kernels.nn import TaskInteractionLevel
torch.manual_seed(0)
module = TaskInteractionLevel(19, 7, pool="softmax").double()
torch.nn.init.normal_(module.tim.pool_weight)
worst = 0.0
for channels_last in (False, True):
    seg = torch.randn(3, 19, 9, 14).double()
    seg = (seg.contiguous(memory_format=torch.channels_last) if channels_last else seg).requires_grad_()
    clf = torch.randn(3, 7).double()
    results = []
    for backend in ("native", "reference"):
        with use_backend(backend):
            out = module(seg, clf)
            results.append([out.seg, *torch.autograd.grad(out.seg.square().sum(), [seg, *module.tim.parameters()])])
    worst = max(worst, *((a - b).abs().max().item() for a, b in zip(*results)))
print(instruction_set(), worst < 1e-10)
"""
    ran, equal = python(code, BTINET_INSTRUCTION_SET=name).stdout.split()
    assert equal == "True"
    assert ran == name or instruction_set() == "portable"


def test_importing_brings_in_nothing_but_torch_and_numpy() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import btinet_kernels, btinet_kernels.nn
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    brought = set(python(code).stdout.split())
    assert brought <= {"btinet_kernels", "torch", "numpy"} | set(sys.stdlib_module_names)


def test_the_extension_knows_no_torch() -> None:
    folder = Path(btinet_kernels.__file__).parent
    (extension,) = folder.glob("_cpu*.so")
    content = extension.read_bytes()
    assert b"libtorch" not in content
    assert b"libc10" not in content
    assert b"libgomp.so.1" in content


def test_debug_log_says_once_who_serves(caplog: pytest.LogCaptureFixture) -> None:
    module = TaskInteractionModule(4, 5)
    with caplog.at_level("DEBUG", logger="btinet_kernels"):
        btinet_kernels.backends.__globals__["_announced"].clear()
        for _ in range(2):
            fused_tim(torch.zeros(2, 4, 3), torch.zeros(2, 5), module.weights())
    assert [r.getMessage() for r in caplog.records] == ["fused_tim is served by native"]
