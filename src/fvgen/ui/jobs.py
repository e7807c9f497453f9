"""The two jobs that answer an order: functions that import what they do where they run, in a process of their own."""

from __future__ import annotations

from pathlib import Path

from fvgen.ui.order import Order, Send


def look(send: Send, folder: Path, order: Order) -> None:
    """`fvgen.ui.work.look`, imported where it runs."""
    from fvgen.ui import work

    work.look(send, folder, order)


def make(send: Send, folder: Path, order: Order) -> None:
    """`fvgen.ui.work.make`, imported where it runs."""
    from fvgen.ui import work

    work.make(send, folder, order)
