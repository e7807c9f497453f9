"""Camera guidance and LaLRM under ZeRO: two processes learn what one does, each from its share of the clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_cameras import SETTINGS
from small_cogvideox import small_teacher
from test_lalrm_method import SMALL, clip
from test_zero import TOLERANCE, ZERO, differences, launch
from torch import Tensor

from fvgen.clips.folder import save_clips
from fvgen.distill import read_metrics, run, stage_config
from fvgen.pipelines.folders import load_pipeline, save_model
from fvgen.pipelines.teacher import TeacherPipeline

pytest.importorskip("deepspeed", reason="DeepSpeed, the extra [train], is not installed")
pytestmark = pytest.mark.slow

# Two clips a process for the camera: one alone has no other's path for `camera_heeded`.
OWN: dict[str, dict[str, Any]] = {
    "lalrm": {"batch_size": 2, "lalrm_lr": 1e-5, **SMALL},
    "camera": {"batch_size": 4, "student_lr": 1e-5, **SETTINGS},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    save_model(small_teacher(image_condition="first"), folder / "teacher")
    save_clips(folder / "clips", [clip(i) for i in range(3)], {"kind": "test"})
    common = {"teacher": str(folder / "teacher"), "data": str(folder / "clips"), "iterations": 5, "track": False}
    common |= {"ema_decay": 0.5, "sample_every": 5}

    def job(method: str, name: str, **changes: object) -> dict:
        return {**common, **OWN[method], "method": method, "out": str(folder / f"{method}-{name}")} | changes

    for method in OWN:
        run(stage_config(method, job(method, "plain")))
    jobs = [job(method, f"zero{z}", deepspeed=ZERO[z]) for method in OWN for z in ZERO]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    outcome = launch("tests/zero_worker.py", folder / "jobs.json")
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    return folder


def learnt(run: Path, method: str) -> dict[str, Tensor]:
    if method == "lalrm":
        return load_pipeline(run / "model", TeacherPipeline).lalrm.state_dict()
    return load_pipeline(run / "teacher", TeacherPipeline).network.state_dict()


@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("sharded", ["zero1", "zero2"])
def test_two_processes_train_as_one_does(runs, method, sharded):
    one, two = runs / f"{method}-plain", runs / f"{method}-{sharded}"
    worst = differences(one, two)
    assert len(read_metrics(two)) == 5 and max(worst.values()) < TOLERANCE, worst
    ours, theirs = learnt(one, method), learnt(two, method)
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5


@pytest.mark.parametrize("method", OWN)
def test_zero_three_is_refused(runs, method):
    said = (runs / f"{method}-zero3.refused").read_text()
    assert f"ZeRO-3 shards networks, and method {method} needs them whole" in said
