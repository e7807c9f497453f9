"""Jobs for tests/test_ui.py, which other processes import: nothing heavy stands here."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from fvgen.errors import UserError


def counts(send, upto: int) -> None:
    for number in range(upto):
        send("told", str(number))


def refuses(send) -> None:
    raise UserError("this is not possible; do that")


def breaks(send, terminal: str) -> None:
    """``terminal``: a file in the place of this process's stderr."""
    os.dup2(os.open(terminal, os.O_WRONLY | os.O_CREAT), 2)
    raise RuntimeError("a secret of the server")


def dies(send) -> None:
    os._exit(9)


def sleeps_with_a_child(send) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    send("told", f"{os.getpid()} {child.pid}")
    time.sleep(600)


def leaves_a_file(send, folder) -> None:
    (folder / "late").write_text("x")
    send("told", "written")
    time.sleep(600)
