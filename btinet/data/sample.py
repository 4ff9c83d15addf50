"""The sample of real images that is shipped with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def sample_csv() -> Path:
    """Return the CSV file of the shipped ISIC 2017 sample (CC-0); ``read_collection`` reads it."""
    return Path(str(resources.files("btinet.data") / "isic2017_sample" / "samples.csv"))
