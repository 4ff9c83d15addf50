"""CSV and JSON files that other programs read back correctly."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from btinet.files import write_text

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write ``rows`` as UTF-8 CSV, whole or not at all.

    Text that a spreadsheet would run as a formula gets a leading apostrophe; numbers stay numbers (six
    significant digits); nan and None become an empty cell.

    Raises:
        UserError: the file cannot be written.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([_cell(name) for name in columns])
    writer.writerows([_cell(row.get(name)) for name in columns] for row in rows)
    write_text(path, buffer.getvalue())


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as strict JSON, whole or not at all: nan becomes null, infinities the text "inf" or
    "-inf".

    Raises:
        UserError: the file cannot be written.
    """
    write_text(path, json.dumps(_strict(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def spreadsheet_text(text: str) -> str:
    """Return ``text`` with a leading apostrophe if a spreadsheet would run it as a formula."""
    return "'" + text if text.startswith(FORMULA_STARTS) else text


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return format(value, ".6g")
    return spreadsheet_text(value) if isinstance(value, str) else value


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return str(value) if isinstance(value, Path) else value
