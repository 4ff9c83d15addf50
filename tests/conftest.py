import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # pools of threads that share cores wait for each other; read by torch
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import btinet_kernels
from btinet_kernels.backends import native_module


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--official",
        type=Path,
        default=Path(__file__).parent / "kernels" / "data" / "official_modules.npz",
        help="numbers of the official modules to compare with (tests/kernels/data/README.md describes the form)",
    )


def pytest_configure(config: pytest.Config) -> None:
    checkout = Path(__file__).parents[1]
    if native_module is None and Path(btinet_kernels.__file__).is_relative_to(checkout):
        raise pytest.UsageError(
            f"the tests would import {checkout}, which lacks the compiled part: run `pip install .` and `pytest` "
            "(`python -m pytest` puts the checkout first)."
        )
