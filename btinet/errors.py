"""The one exception that means "the input is at fault", shown to the user as a single sentence."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """Input that cannot be used.

    The message is one clear sentence: which file or argument, what was found, what was expected, what to do.
    The command line prints it and exits with code 2; it never shows a traceback for it.

    Attributes:
        details: lines that follow the sentence there, where a list says more.
    """

    def __init__(self, sentence: str, details: Sequence[str] = ()) -> None:
        super().__init__(sentence)
        self.details = tuple(details)
