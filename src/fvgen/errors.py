"""The one exception that a user may see as a single sentence."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class CannotWrite(UserError):
    """A full disk or a place that is closed: nothing goes on before it is mended, whatever else could be skipped."""


class Stopped(Exception):
    """The run was asked to end and did, with everything saved. The command line exits with code 0."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause such as ``; did you mean 'seed'?``, or the list of known names when none is near."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its class where it says nothing (an EOFError does)."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:120]
