"""Where a command gets its data from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from btinet.data.layout_options import LayoutOptions
from btinet.data.layouts import read_collection
from btinet.data.manifest import read_manifest
from btinet.data.samples import Collection
from btinet.errors import UserError


@dataclass(frozen=True)
class DataSource:
    """A data set as the command line names it.

    Attributes:
        path: folder or CSV file.
        dataset: layout, one of ``DATASETS``.
        options: what the layout needs beside the folder.
        manifest: take the samples from this file, see ``read_manifest``; with it, the other two are not needed.
    """

    path: Path
    dataset: str = "auto"
    options: LayoutOptions = field(default_factory=LayoutOptions)
    manifest: Path | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DataSource:
        """Build from the options data, dataset, manifest, curated, ... of a command or a run's config.yaml."""

        def file(name: str) -> Path | None:
            return None if options.get(name) is None else Path(options[name])

        layout = LayoutOptions(
            file("curated"),
            file("labels"),
            file("lesion_groups"),
            bool(options.get("drop_train_duplicates_of_test")),
        )
        return cls(Path(options["data"]), options.get("dataset") or "auto", layout, file("manifest"))

    def read(self, classes: Sequence[str] | None = None) -> Collection:
        """Read the samples; raises ``UserError`` as ``read_collection`` and ``read_manifest`` do."""
        if self.manifest is None:
            return read_collection(self.path, self.dataset, classes, self.options)
        if self.options != LayoutOptions():
            raise UserError(
                f"--manifest {self.manifest}: says which images there are and what they show; leave out --curated, "
                "--labels, --lesion-groups and --drop-train-duplicates-of-test, or the manifest."
            )
        if not self.path.exists():
            raise UserError(f"{self.path}: no such file or folder; give the folder or CSV file that holds the data.")
        return read_manifest(self.manifest, self.path, classes)
