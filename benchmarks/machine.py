"""Which machine this is, and the allocator setting that all variants share."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from btinet import allocator


def describe(device: str) -> dict[str, Any]:
    """What a reader has to know about the machine; no name of a host or user."""
    import torch

    from btinet_kernels.backends import instruction_set, native_module

    described: dict[str, Any] = {
        "slug": slug(device),
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "instruction_sets": cpu_extensions(),
        "native_instruction_set": instruction_set() if native_module is not None else None,
        "allocator": allocator.description(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "date": datetime.date.today().isoformat(),
        "device": device,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described["gpu"] = properties.name
        described["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        described["gpu_l2_mib"] = round(properties.L2_cache_size / 2**20, 1)
        described["cuda"] = torch.version.cuda
        described["convolutions_use_tf32"] = torch.backends.cudnn.allow_tf32
    return described


def slug(device: str) -> str:
    """A folder name that says what the machine is, such as ``2-core-amd-epyc-avx512`` or ``nvidia-h200``."""
    if device == "cuda":
        import torch

        return _slugged(torch.cuda.get_device_name(0))
    widest = next((name for name in ("avx512", "avx2", "sve", "neon") if name in cpu_extensions()), "scalar")
    return _slugged(f"{cores()} core {cpu_model()} {widest}")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's name without trade marks and clock rate."""
    name = _cpu_info("model name") or platform.processor() or platform.machine()
    name = re.sub(r"\((R|TM|r|tm)\)|@.*|\b(CPU|Processor|\d+-Core)\b", " ", name)
    family, model = _cpu_info("cpu family"), _cpu_info("model")
    if family and model and not re.search(r"\d", name):  # a virtual machine hides which generation it is
        name += f" family {family} model {model}"
    return " ".join(name.split())


def cpu_extensions() -> list[str]:
    """The vector instruction sets that matter here."""
    flags = (_cpu_info("flags") or _cpu_info("Features") or "").split()
    known = {"avx2": "avx2", "fma": "fma", "avx512f": "avx512", "avx512_bf16": "avx512_bf16", "amx_bf16": "amx_bf16"}
    known |= {"asimd": "neon", "sve": "sve", "bf16": "bf16"}
    return [name for flag, name in known.items() if flag in flags]


def _cpu_info(field: str) -> str | None:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    match = re.search(rf"^{re.escape(field)}\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1] if match else None


def _slugged(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
