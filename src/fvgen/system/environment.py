"""Numbers that launchers put into the environment."""

from __future__ import annotations

import os

from fvgen.errors import UserError, short

MOST = 1_000_000


def number(name: str, default: int) -> int:
    """A count in the environment. Raises UserError for what is none."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 8 and int(text) <= MOST):
        raise UserError(f"{name}={short(text)} in the environment is no number of 0 to {MOST}; correct or unset it")
    return int(text)
