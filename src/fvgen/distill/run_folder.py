"""The output folder of a stage: whose it is, who is at work in it, how far its run has come."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml

from fvgen import __version__
from fvgen.distill.checkpoint import CheckpointFolder
from fvgen.distill.config import StageConfig, read_yaml, stage_config
from fvgen.errors import UserError
from fvgen.system.files import TEMPORARY, atomic_path, locked, recover, remove, writable_folder, write_json

LOCK = ".lock"  # held while a run is at work
SUMMARY = "summary.json"  # there if and only if the stage is done
LOG = "metrics.jsonl"
WRITTEN_BY = "fvgen"  # key of config.yaml: the version that wrote it


class RunFolder:
    """The folder ``config.out``; only the main process asks it anything."""

    def __init__(self, config: StageConfig) -> None:
        self.config, self.root = config, Path(config.run.out)
        self.checkpoints = CheckpointFolder(self.root / "checkpoints", config.log.keep_checkpoints)

    def judge(self) -> None:
        """Raises UserError where it holds anything but this very run, or where that run is at work."""
        file = self.root / "config.yaml"
        if file.exists():
            theirs, ours = read_run_config(self.root).words(), self.config.words()
            for key in {**ours, **theirs}:
                if key not in self.config.resumable() and theirs.get(key) != ours.get(key):
                    raise UserError(
                        f"output folder {self.root} holds another run ({key} is {theirs.get(key)!r} there and "
                        f"{ours.get(key)!r} here); choose another output folder or delete it"
                    )
            with self.lock():
                pass
        elif self.root.is_dir() and any(TEMPORARY not in p.name and p.name != LOCK for p in self.root.iterdir()):
            raise UserError(f"output folder {self.root} is not empty and holds no run; choose another output folder")

    def claim(self) -> None:
        """Make it ours. Raises UserError where it cannot be written."""
        writable_folder(self.root)
        with atomic_path(self.root / "config.yaml") as temporary:
            temporary.write_text(yaml.safe_dump({WRITTEN_BY: __version__, **self.config.words()}, sort_keys=False))

    def lock(self) -> AbstractContextManager[None]:
        """Held inside; raises UserError where another run has it."""
        return locked(self.root / LOCK)

    def mend(self) -> None:
        """Finish or undo what a kill has left half-written."""
        for name in ("student", "head"):
            recover(self.root / name)
        self.checkpoints.clean()

    def is_finished(self) -> bool:
        file = self.root / SUMMARY
        return file.exists() and json.loads(file.read_text())["iterations"] >= self.config.run.iterations

    def finish(self, iterations: int, seconds: float) -> None:
        """The last thing that a stage writes."""
        summary = {"stage": self.config.name, "iterations": iterations, "seconds": round(seconds, 1)}
        write_json(self.root / SUMMARY, summary)

    def reopen(self) -> None:
        """A finished run that goes on for more iterations is not finished."""
        remove(self.root / SUMMARY)

    def rows(self) -> list[dict[str, Any]]:
        return read_metrics(self.root)

    def cut_log(self, done: int) -> None:
        """Keep the rows of the first ``done`` iterations. Raises UserError where some are missing."""
        log = self.root / LOG
        lines = log.read_bytes().decode(errors="replace").split("\n")[:done] if log.exists() else []
        if not _are_rows(lines, done):
            raise UserError(
                f"{log} lacks rows of the {done} iterations that the checkpoint stands at; "
                f"delete {self.root} to start this stage again, or choose another output folder"
            )
        with atomic_path(log) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines))

    def scores(self) -> dict[int, float]:
        """What `keep_best_by` gives the checkpoints: the metric's mean over the iterations before each."""
        name, every, rows = self.config.log.keep_best_by, self.config.log.checkpoint_every, self.rows()
        scores = {}
        for iteration in self.checkpoints.iterations() if name else []:
            seen = [row[name] for row in rows[max(0, iteration - every) : iteration] if name in row]
            if seen:
                scores[iteration] = sum(seen) / len(seen)
        return scores


def read_run_config(folder: Path) -> StageConfig:
    """The settings that a run was started with. Raises UserError for a folder that an older fvgen wrote."""
    file = folder / "config.yaml"
    words = read_yaml(file)
    version = words.pop(WRITTEN_BY, None)
    if version is None and "stage" in words:
        raise UserError(
            f"{folder} was written by fvgen 0.1, whose settings and checkpoints this version ({__version__}) does not "
            "read; finish it with that one, or choose another output folder"
        )
    return stage_config(str(words.get("method")), words, str(file))


def read_metrics(stage_folder: str | Path) -> list[dict[str, float]]:
    """The rows of a stage's metrics.jsonl."""
    return [json.loads(line) for line in (Path(stage_folder) / LOG).read_text().splitlines()]


def _are_rows(lines: Sequence[str], count: int) -> bool:
    """Whether these are the whole rows of iterations 1 to ``count``."""
    try:
        return [json.loads(line)["iteration"] for line in lines] == list(range(1, count + 1))
    except (ValueError, KeyError, TypeError):
        return False


def finished_stage(folder: str) -> Path:
    """The path of an ``init``. Raises UserError where no finished stage is there."""
    path = Path(folder)
    if not (path / SUMMARY).exists():
        state = "is not finished; run it again first" if path.is_dir() else "does not exist"
        raise UserError(f"init={folder} {state}, or give the folder of another finished stage")
    return path
