"""Comma-separated tables with a header, read strictly and written whole."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from btinet.errors import UserError
from btinet.files import write_text

_LONGEST_CELL = 4096
_SEPARATED = {",": "comma", ";": "semicolon"}


def read_table(path: Path, required: Sequence[str], delimiter: str = ",") -> list[tuple[int, dict[str, str]]]:
    """Read a UTF-8 CSV file; return its rows as (line number, column name → stripped cell).

    Cells missing at the end of a row are empty strings.

    Raises:
        UserError: not readable, not UTF-8, a required column missing, a column twice, a row with too many
            cells.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.reader(handle, strict=True, delimiter=delimiter)
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header, required, delimiter)
            rows = []
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) > len(header):
                    raise UserError(
                        f"{path}: line {reader.line_num} has {len(cells)} cells but the header has "
                        f"{len(header)}; put cells that contain a {_SEPARATED[delimiter]} in double quotes."
                    )
                if max(map(len, cells)) > _LONGEST_CELL:
                    raise UserError(
                        f"{path}: line {reader.line_num} has a cell of {max(map(len, cells))} characters, expected at "
                        f"most {_LONGEST_CELL}; is a double quote missing?"
                    )
                padded = [*cells, *[""] * (len(header) - len(cells))]
                rows.append((reader.line_num, {n: c.strip() for n, c in zip(header, padded, strict=True)}))
            return rows
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror or error}).") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not a {_SEPARATED[delimiter]}-separated UTF-8 text file ({error}).") from error


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV file, whole or not at all; raises ``UserError`` when it cannot be written."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _check_header(path: Path, header: list[str], required: Sequence[str], delimiter: str) -> None:
    missing = [name for name in required if name not in header]
    if missing:
        raise UserError(
            f"{path}: the first line must name the {_SEPARATED[delimiter]}-separated columns {', '.join(required)}; "
            f"{', '.join(missing)} not found in {delimiter.join(header)[:200]!r}."
        )
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: the column {repeated[0]!r} appears more than once in the first line; keep one.")
