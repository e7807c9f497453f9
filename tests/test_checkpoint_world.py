"""Two real processes (gloo) that save together: what if the first one cannot?"""

from __future__ import annotations

import resource
import signal
from datetime import timedelta
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist

from fvgen.distill.checkpoint import load_checkpoint, save_checkpoint
from fvgen.errors import UserError
from fvgen.system.processes import World

SIZE = 1 << 16


class Shared:
    """A state that takes a collective to collect, as those of ZeRO's engines do."""

    def state_dict(self) -> dict:
        total = torch.ones(SIZE)
        dist.all_reduce(total)
        return {"total": total}

    def load_state_dict(self, state: dict) -> None:
        self.total = state["total"]


def _save(rank: int, folder: str, file_limit: int | None) -> None:
    """Leaves in ``folder`` what became of process ``rank``."""
    root = Path(folder)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/store", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    things, world = {"a": Shared(), "b": Shared(), "c": Shared()}, World(rank, 2, rank)
    if file_limit and rank == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    try:
        save_checkpoint(root / "checkpoint", 7, things, {"model": "m"}, world)
        load_checkpoint(root / "checkpoint", things, {"model": "m"}, world)
        outcome = f"saved {things['c'].total[-1]:g}"
    except UserError as error:
        outcome = str(error)
    (root / f"outcome{rank}").write_text(outcome)


@pytest.mark.parametrize(
    ("file_limit", "expected"), [(None, "saved 2"), (SIZE, "cannot write {}/checkpoint: the disk is full")]
)
def test_all_processes_end_alike(tmp_path, file_limit, expected):
    both = [processes.SERVER.Process(target=_save, args=(rank, str(tmp_path), file_limit)) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(2):
        assert (tmp_path / f"outcome{rank}").read_text().startswith(expected.format(tmp_path))
    assert (tmp_path / "checkpoint").exists() == (file_limit is None)
    assert not list(tmp_path.glob("*.partial*"))
