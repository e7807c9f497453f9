"""LaLRM under ZeRO: two processes learn what one does, each from its share of the clips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_cogvideox import small_teacher
from test_lalrm_method import SMALL, clip
from test_zero import TOLERANCE, ZERO, differences, launch

from fvgen.clips.folder import save_clips
from fvgen.distill import read_metrics, run, stage_config
from fvgen.pipelines.folders import load_pipeline, save_model
from fvgen.pipelines.teacher import TeacherPipeline

pytest.importorskip("deepspeed", reason="DeepSpeed, the extra [train], is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    save_model(small_teacher(image_condition="first"), folder / "teacher")
    save_clips(folder / "clips", [clip(i) for i in range(3)], {"kind": "test"})
    common = {"method": "lalrm", "teacher": str(folder / "teacher"), "data": str(folder / "clips"), "batch_size": 2}
    common |= {"iterations": 5, "track": False, "lalrm_lr": 1e-5, "ema_decay": 0.5, "sample_every": 5, **SMALL}

    def job(name: str, **changes: object) -> dict:
        return {**common, "out": str(folder / name)} | changes

    run(stage_config("lalrm", job("plain")))
    jobs = [job(f"zero{z}", deepspeed=ZERO[z]) for z in ZERO]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    outcome = launch("tests/zero_worker.py", folder / "jobs.json")
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    return folder


@pytest.mark.parametrize("sharded", ["zero1", "zero2"])
def test_two_processes_train_as_one_does(runs, sharded):
    worst = differences(runs / "plain", runs / sharded)
    assert len(read_metrics(runs / sharded)) == 5 and max(worst.values()) < TOLERANCE, worst
    one, two = (load_pipeline(runs / name / "model", TeacherPipeline).lalrm.state_dict() for name in ("plain", sharded))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5


def test_zero_three_is_refused(runs):
    assert "ZeRO-3 shards networks, and method lalrm needs them whole" in (runs / "zero3.refused").read_text()
