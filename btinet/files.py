"""Files that appear whole or not at all."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from btinet.errors import UserError


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; rename it to ``path`` on success, remove it on any failure.

    The temporary name keeps the suffix of ``path`` (savers that look at it keep working). Parent folders are
    created. ``durable``: the file is on the disk, not only on its way there, before it gets its name.

    Raises:
        UserError: the file could not be written (full disk, no permission, a folder in its place).
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_temporary_prefix(target), suffix=target.suffix, dir=target.parent)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp and some savers make files only their owner can read
        if durable:
            _synchronise(temporary)
        os.replace(temporary, target)
        if durable:
            _synchronise(target.parent)
    except OSError as error:
        raise UserError(f"{target}: could not be written ({error.strerror or error}).") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all; raises ``UserError`` when it cannot."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove temporary files of ``path`` that a killed process left; nobody may be writing it."""
    target = Path(path)
    for leftover in target.parent.glob(f"{glob.escape(_temporary_prefix(target))}*{glob.escape(target.suffix)}"):
        leftover.unlink(missing_ok=True)


def _temporary_prefix(target: Path) -> str:
    return f".{target.stem}-"


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
