"""The output folder of a stage: whose it is, who is at work in it, how far its run has come."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fvgen import __version__
from fvgen.distill.checkpoint import CheckpointFolder
from fvgen.distill.config import read_yaml, stage_config
from fvgen.distill.settings import StageConfig
from fvgen.distill.sources import SOURCES, check_source, contents, located, moved
from fvgen.errors import UserError, first_problem
from fvgen.system.doors import Unreadable, parse_json, problem, read_object, read_rows, read_text, there
from fvgen.system.files import (
    TEMPORARY,
    atomic_path,
    judge_output,
    locked,
    recover,
    remove,
    writable_folder,
    write_json,
    write_text,
)

LOCK = ".lock"  # held while a run is at work
SUMMARY = "summary.json"  # there if and only if the stage is done
LOG = "metrics.jsonl"
WRITTEN_BY = "fvgen"  # key of config.yaml: the version that wrote it
CONTENTS = "contents"  # ... and what was in its sources then


class RunFolder:
    """The folder ``config.out``; only the main process asks it anything."""

    def __init__(self, config: StageConfig) -> None:
        self.config, self.root = config, Path(config.run.out)
        self.checkpoints = CheckpointFolder(self.root / "checkpoints", config.log.keep_checkpoints)

    def judge(self) -> None:
        """Raises UserError where it holds anything but this very run, or where that run is at work."""
        judge_output(self.config.run.out, option="out=")
        file = self.root / "config.yaml"
        if file.exists():
            theirs, ours = located(read_run_config(self.root, follow=False).words()), located(self.config.words())
            differing = [key for key in {**ours, **theirs} if theirs.get(key) != ours.get(key)]
            if any(key in SOURCES for key in differing):  # one moved is still the same
                before, now = read_yaml(file).get(CONTENTS) or {}, contents(ours)
                differing = [key for key in differing if key not in now or now[key] != before.get(key)]
            for key in differing:
                if key not in self.config.resumable():
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
        words = self.config.words()
        out = {"out": str(self.root.resolve())}  # where sources are from here, should all be moved
        settings = {WRITTEN_BY: __version__, **located(words), **out, CONTENTS: contents(words)}
        with atomic_path(self.root / "config.yaml") as temporary:
            write_text(temporary, yaml.safe_dump(settings, sort_keys=False))

    def lock(self) -> AbstractContextManager[None]:
        """Held inside; raises UserError where another run has it."""
        return locked(self.root / LOCK)

    def mend(self) -> None:
        """Finish or undo what a kill has left half-written."""
        for name in {"student", "head", self.config.method.result}:
            recover(self.root / name)
        self.checkpoints.clean()

    def is_finished(self) -> bool:
        return there(self.root / SUMMARY) and read_summary(self.root).iterations >= self.config.run.iterations

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
        cure = f"delete {self.root} to start this stage again"
        lines = read_text(log, errors="replace", cure=cure).split("\n")[:done] if there(log) else []
        if not _are_rows(lines, done):
            raise UserError(
                f"{log} lacks rows of the {done} iterations that the checkpoint stands at; "
                f"delete {self.root} to start this stage again, or choose another output folder"
            )
        with atomic_path(log) as temporary:
            write_text(temporary, "".join(line + "\n" for line in lines))

    def scores(self) -> dict[int, float]:
        """What `keep_best_by` gives the checkpoints: the metric's mean over the iterations before each."""
        name, every, rows = self.config.log.keep_best_by, self.config.log.checkpoint_every, self.rows()
        scores = {}
        for iteration in self.checkpoints.iterations() if name else []:
            seen = [row[name] for row in rows[max(0, iteration - every) : iteration] if name in row]
            if seen:
                scores[iteration] = sum(seen) / len(seen)
        return scores


def read_run_config(folder: Path, follow: bool = True) -> StageConfig:
    """The settings that a run was started with; ``follow``: its sources where they are if all was moved together.

    Raises UserError for a folder that an older fvgen wrote.
    """
    file = folder / "config.yaml"
    words = read_yaml(file)
    version, _ = words.pop(WRITTEN_BY, None), words.pop(CONTENTS, None)
    if version is None and "stage" in words:
        raise UserError(
            f"{folder} was written by fvgen 0.1, whose settings and checkpoints this version ({__version__}) does not "
            "read; finish it with that one, or choose another output folder"
        )
    return stage_config(str(words.get("method")), moved(words, folder) if follow else words, str(file))


class Summary(BaseModel):
    """``summary.json``: a stage that is done."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    stage: str
    iterations: int = Field(ge=0)
    seconds: float = Field(ge=0)


def read_summary(folder: Path) -> Summary:
    """Raises UserError for a file that is not what `RunFolder.finish` writes."""
    cure = f"delete it and run the stage in {folder} again, which only writes its student anew"
    content = read_object(folder / SUMMARY, cure)
    try:
        return Summary.model_validate(content)
    except ValidationError as error:
        raise Unreadable(folder / SUMMARY, first_problem(error), cure) from None


def read_metrics(stage_folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a stage's metrics.jsonl. Raises UserError for a damaged one."""
    return read_rows(Path(stage_folder) / LOG, f"delete {stage_folder} to start this stage again")


def _are_rows(lines: Sequence[str], count: int) -> bool:
    """Whether these are the whole rows of iterations 1 to ``count``."""
    try:
        return [parse_json(line, LOG)["iteration"] for line in lines] == list(range(1, count + 1))
    except (UserError, KeyError, TypeError):
        return False


def check_paths(config: StageConfig) -> None:
    """Judge the paths that the settings name. Raises UserError for the first that is not there: before seconds are
    spent on imports, and minutes on reading."""
    words, file = config.words(), Path(config.run.out) / "config.yaml"
    before = read_yaml(file) if file.is_file() else {}
    for key in SOURCES:
        if words[key]:
            check_source(key, words[key], before.get(key))
    if config.run.init:
        finished_stage(config.run.init)
    if config.memory.deepspeed and problem(config.memory.deepspeed):
        raise UserError(f"DeepSpeed settings {config.memory.deepspeed} do not exist; give a JSON file")


def finished_stage(folder: str) -> Path:
    """The path of an ``init``. Raises UserError where no finished stage is there."""
    path = Path(folder)
    if not there(path / SUMMARY):
        state = "is not finished; run it again first" if path.is_dir() else "does not exist"
        raise UserError(f"init={folder} {state}, or give the folder of another finished stage")
    read_summary(path)
    return path
