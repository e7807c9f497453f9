"""Commands in processes of their own, cheap enough for dozens of cases: they can be killed, limited and read.

Each is forked from one server that has imported torch and fvgen, because importing takes seconds. What that leaves
out, the start of Python itself, is in `test_recipes.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["fvgen.reports.demo", "fvgen.cli"])


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


class Command:
    """A script of this repository, or the module ``fvgen.cli``, that runs in ``folder``.

    ``file_limit`` bytes are the most that it may write to any file: a real error of the system, as on a full disk.
    """

    def __init__(self, words: Sequence[object], folder: Path, file_limit: int | None = None) -> None:
        self._printed = [folder / f"{name}.{os.urandom(4).hex()}" for name in ("stdout", "stderr")]
        arguments = ([str(word) for word in words], str(folder), [str(path) for path in self._printed], file_limit)
        self.process = SERVER.Process(target=_run, args=arguments)
        self.process.start()

    def running(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        """SIGKILL: the process cannot clean up."""
        self.process.kill()
        self.process.join()

    def finish(self, seconds: float = 300) -> Outcome:
        """Wait for the end. What was printed is removed from the folder."""
        self.process.join(seconds)
        assert not self.process.is_alive(), "the command hangs"
        out, err = (path.read_text() for path in self._printed)
        for path in self._printed:
            path.unlink()
        return Outcome(self.process.exitcode, out, err)


def run(words: Sequence[object], folder: Path, file_limit: int | None = None) -> Outcome:
    """A command from start to end."""
    return Command(words, folder, file_limit).finish()


def _run(words: list[str], folder: str, printed: list[str], file_limit: int | None) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error for the program instead of its death
    for descriptor, path in zip((1, 2), printed, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    if file_limit is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # progress bars may be long
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = words
    if words[0] == "fvgen.cli":
        sys.modules.pop("fvgen.cli", None)  # runpy warns of a module that the server has imported already
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__")
