"""The one exception that a user may see as a single sentence."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from reprlib import Repr
from typing import Any

LONGEST = 2000  # characters of a sentence: what a file holds, or a name, may be of any length

LISTED = 40  # known names that a sentence lists

# What a file holds may be of any length; an error message is one sentence.
SHORT = Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 100


def short(value: object) -> str:
    """``repr`` of what somebody else wrote, in at most some hundred characters and without line breaks."""
    try:
        return " ".join(SHORT.repr(value).split())
    except (ValueError, RecursionError):  # a number of more digits than Python writes
        return f"<{type(value).__name__}>"


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2. A sentence that grew beyond `LONGEST` loses
    its middle: what is wrong stands at its beginning, the cure at its end.
    """

    def __init__(self, sentence: object = "") -> None:
        text = str(sentence)
        half = LONGEST // 2
        super().__init__(text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}")


class CannotWrite(UserError):
    """A full disk or a place that is closed: nothing goes on before it is mended, whatever else could be skipped."""


class Stopped(Exception):
    """The run was asked to end and did, with everything saved. The command line exits with code 0."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause such as ``; did you mean 'seed'?``, or the list of known names when none is near."""
    known = sorted(known)
    near = get_close_matches(name[:100], known, n=1)
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known[:LISTED])}{more}"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its class where it says nothing (an EOFError does)."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:120]


def first_problem(error: Any) -> str:
    """Where and what a pydantic ValidationError finds wrong first."""
    problem = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in problem['loc'])[:100]}: {problem['msg'].lower()[:120]}"
