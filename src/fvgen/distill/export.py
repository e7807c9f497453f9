"""From trained weights to a pipeline folder, at the end of a stage or from any of its checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from fvgen.distill.checkpoint import CheckpointFolder, load_weights
from fvgen.distill.config import read_yaml
from fvgen.distill.methods.written import write_student
from fvgen.distill.run_folder import CONTENTS, read_run_config
from fvgen.distill.settings import StageConfig
from fvgen.distill.sources import contents, is_path
from fvgen.errors import UserError, first_line
from fvgen.models.family import family_of
from fvgen.pipelines.folders import load_pipeline, model_kind
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.system.doors import problem
from fvgen.system.files import TEMPORARY, busy, judge_output, writable_folder


def _replaceable(out: Path) -> bool:
    """Whether ``out`` is a folder with an earlier student, or with nothing. A teacher is not to be lost."""
    if (out / "model_index.json").is_file():
        family = family_of(model_kind(out))
        return family is not None and model_kind(out) in family.students
    return out.is_dir() and all(TEMPORARY in path.name for path in out.iterdir())


def export_checkpoint(run: str | Path, out: str | Path, iteration: int | None = None) -> Path:
    """The averaged student of a stage's checkpoint (the newest by default) as the diffusers folder ``out``.

    ``run`` is the stage's own folder; the run may still be going on. Raises UserError for a folder without checkpoints,
    an iteration that was not kept, a damaged checkpoint, or an ``out`` that holds something else.
    """
    run, out = Path(run), judge_output(out, inputs=[Path(run) / name for name in ("checkpoints", "student", "teacher")])
    if problem(run / "config.yaml"):
        raise UserError(f"{run} is no run's folder (it has no config.yaml); give the output folder of a stage")
    config = read_run_config(run)
    checkpoints = CheckpointFolder(run / "checkpoints", config.log.keep_checkpoints)
    kept = checkpoints.iterations()
    if not kept:
        raise UserError(f"{run} has no checkpoint yet; wait for iteration {config.log.checkpoint_every}")
    if iteration is not None and iteration not in kept:
        raise UserError(f"{run} keeps no checkpoint of iteration {iteration}; it has {', '.join(map(str, kept))}")
    if out.exists() and not _replaceable(out):
        raise UserError(f"{out} is no earlier student and not empty; choose another --out")
    if is_path("teacher", config.run.teacher) and not Path(config.run.teacher).is_dir():
        raise UserError(
            f"the run in {run} began with teacher={config.run.teacher}, which is not there any more; put it back, or "
            "resume the run once with teacher=DIR of an equal one"
        )
    before, now = read_yaml(run / "config.yaml").get(CONTENTS), contents(config.words())
    if isinstance(before, dict) and before.get("teacher") != now.get("teacher"):
        raise UserError(
            f"teacher={config.run.teacher} is not the one that the run in {run} began with (its files differ); put "
            "that one back"
        )
    with busy(out):
        return _export(config, checkpoints.path(iteration or kept[-1]), out)


def _export(config: StageConfig, checkpoint: Path, out: Path) -> Path:
    weights = load_weights(checkpoint, "ema")
    base = config.method.base_of(load_pipeline(config.run.teacher, TeacherPipeline), config.run.seed)
    writable_folder(out.parent)
    try:
        with torch.no_grad():
            write_student(config, base, weights, out)
    except (LookupError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"checkpoint {checkpoint} does not fit teacher={config.run.teacher} ({first_line(error)}); put the teacher "
            "back that the run began with"
        ) from error
    return out
