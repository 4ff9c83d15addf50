"""Silence for the command line."""

from __future__ import annotations

import warnings


def quiet_libraries() -> None:
    """Hide advice of libraries to their own callers, which is not for whoever runs a command."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(lightning|torch|timm)\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(lightning|torch|timm)\..*")
