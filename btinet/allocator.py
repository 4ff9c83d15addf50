"""glibc's malloc as the command line wants it: freed pages stay in the process.

By default large blocks go back to the system, and every training step pays their page faults again. Only an application
may decide this, so importing a package of ours never does.
"""

from __future__ import annotations

import ctypes
import os
import sys

from btinet.errors import UserError

ENVIRONMENT_VARIABLE = "BTINET_MALLOC"
SYSTEM_DEFAULT = "the system's default"
TOP_PAD = 64 << 20
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # from glibc's malloc.h


_kept = False


def keep_pages() -> None:
    """Let glibc keep freed pages in this process; call it before anything large is allocated.

    Does nothing where ``BTINET_MALLOC=system`` asks for that, where the user has set glibc's own variables
    (``MALLOC_…``, ``GLIBC_TUNABLES``) or preloaded another allocator, and where there is no glibc.

    Raises:
        UserError: ``BTINET_MALLOC`` has another value.
    """
    global _kept
    request = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if request not in ("", "system"):
        raise UserError(
            f"{ENVIRONMENT_VARIABLE}={request!r}: the only value is 'system', which leaves the memory allocator as it "
            "is; unset the variable to let btinet keep freed pages."
        )
    library = None if request == "system" or _set_by_user() else _glibc()
    if library is not None:
        settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, TOP_PAD))
        _kept = all(library.mallopt(parameter, value) for parameter, value in settings)


def description() -> str:
    """What this process allocates from, for reports of measurements."""
    if _kept:
        return f"glibc malloc that keeps its pages (M_MMAP_MAX=0, M_TRIM_THRESHOLD=-1, M_TOP_PAD={TOP_PAD})"
    theirs = _set_by_user()
    if _glibc() is None and os.environ.get("LD_PRELOAD"):
        theirs.append(f"LD_PRELOAD={os.environ['LD_PRELOAD']}")
    return f"as the environment says ({', '.join(theirs)})" if theirs else SYSTEM_DEFAULT


def _set_by_user() -> list[str]:
    """The environment variables that already steer glibc's malloc."""
    names = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return names + ([f"GLIBC_TUNABLES={tunables}"] if "glibc.malloc." in tunables else [])


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc and its malloc serves this process."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library, process = ctypes.CDLL("libc.so.6"), ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018
        # Torch allocates by posix_memalign, which every other allocator replaces as well.
        ours, serving = (ctypes.cast(x.posix_memalign, ctypes.c_void_p).value for x in (library, process))
    except (OSError, AttributeError):
        return None
    return library if ours == serving else None
