from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--official",
        type=Path,
        default=Path(__file__).parent / "kernels" / "data" / "official_modules.npz",
        help="numbers of the official modules to compare with (tests/kernels/data/README.md describes the form)",
    )
