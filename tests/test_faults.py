"""The n-th write, rename or flush fails, for every n of a short command: one sentence, nothing half-written under a
final name, and the same command finishes once the cause is gone."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checks import hashes

from fvgen.distill import export_checkpoint
from fvgen.distill import run as distill
from fvgen.errors import UserError
from fvgen.reports.contact_sheet import inspect
from fvgen.system import files

ERRORS = {
    "ENOSPC": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "EIO": lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
    "EACCES": lambda: OSError(errno.EACCES, os.strerror(errno.EACCES)),
    "EDQUOT": lambda: OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    "MemoryError": MemoryError,
}
POINTS = ((os, "replace"), (os, "fsync"), (Path, "write_text"), (Path, "write_bytes"), (Path, "mkdir"), (torch, "save"))
"""What a command does to the disk, as the system and the libraries offer it."""


class Fault(Exception):
    """Never seen: counts without failing."""


@contextmanager
def failing(number: int, make: Callable[[], BaseException]) -> Iterator[list[int]]:
    """The ``number``-th of all calls to `POINTS` raises; counts them in the list that is given."""
    count, before = [0], [(owner, name, getattr(owner, name)) for owner, name in POINTS]

    def wrapped(call: Callable) -> Callable:
        def run(*args, **kwargs):
            count[0] += 1
            if count[0] == number:
                raise make()
            return call(*args, **kwargs)

        return run

    for owner, name, call in before:
        setattr(owner, name, wrapped(call))
    try:
        yield count
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)


Command = Callable[[Path], object]


def each_fault(command: Command, tmp_path: Path, kinds: list[str], stride: int = 1) -> int:
    """Run ``command`` with every fault; returns how many there were."""
    with failing(0, Fault) as count:
        command(tmp_path / "straight")
    straight, total = hashes(tmp_path / "straight"), count[0]
    assert total > 3 and straight
    for number in range(1, total + 1, stride):
        for kind in kinds:
            out = tmp_path / "out"
            shutil.rmtree(out, ignore_errors=True)
            with failing(number, ERRORS[kind]):
                try:
                    command(out)
                except UserError as error:
                    assert "\n" not in str(error)
                except MemoryError:
                    assert kind == "MemoryError"  # which the command line puts into a sentence
            assert not list(tmp_path.rglob(f"*{files.TEMPORARY}*")), (number, kind)
            command(out)
            found = {name: digest for name, digest in hashes(out).items() if name in straight}
            assert {name for name in straight if found.get(name) != straight[name]} <= CLOCKS, (number, kind)
    return total


CLOCKS = {
    *("monitor.jsonl", "summary.json", "log.txt", "config.yaml", "clock.pt", "checkpoint.json", ".lock"),
}
"""Files with seconds or the output's own path in them."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ENOSPC", "EIO"])
def test_an_export_survives_every_fault(stage, tmp_path, kind):
    distill(stage(iterations=1))
    assert each_fault(lambda out: export_checkpoint(tmp_path / "gan", out / "student"), tmp_path / "a", [kind]) > 3


def test_a_page_survives_every_fault(shard_scenes, tmp_path):
    each_fault(lambda out: inspect(shard_scenes / "scene0", out / "page.html"), tmp_path / "a", list(ERRORS))


@pytest.mark.slow
def test_preparing_survives_every_fault(make_shards, shard_scenes, tmp_path):
    each_fault(lambda out: make_shards(out), tmp_path / "a", ["ENOSPC", "EIO", "MemoryError"])


@pytest.mark.slow
def test_training_survives_every_fault(stage, tmp_path):
    def train(out: Path) -> None:
        distill(stage(out=str(out), iterations=2, checkpoint_every=1, track=False, sample_every=0))

    each_fault(train, tmp_path / "a", ["ENOSPC", "EIO"], stride=3)
