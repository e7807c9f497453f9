"""Leap flow distillation under ZeRO: the target follows sharded masters, what does not learn is the teacher's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_zero import TOLERANCE, ZERO, differences, launch

from fvgen.distill import read_metrics, run, stage_config
from fvgen.models.viewcrafter.leap import FVGenLeapPipeline
from fvgen.pipelines.folders import load_pipeline

pytest.importorskip("deepspeed", reason="DeepSpeed, the extra [train], is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(teacher_folder, clip_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    common = {"method": "leap", "teacher": str(teacher_folder), "data": str(clip_folder), "batch_size": 4, "k": 50}
    # Targets that move fast, and small steps, whose rounding does not grow.
    common |= {"iterations": 10, "track": False, "student_lr": 1e-5, "ema_decay": 0.5, "sample_every": 5}

    def job(name: str, **changes: object) -> dict:
        return {**common, "out": str(folder / name)} | changes

    adapters = {"share_backbone": True, "student_lora": True, "lora_rank": 2}
    run(stage_config("leap", job("plain")))
    run(stage_config("leap", job("lora", **adapters)))
    jobs = [job(f"zero{z}", deepspeed=ZERO[z]) for z in ZERO]
    jobs.append(job("lora2", deepspeed=ZERO[2], **adapters))
    jobs.append(job("bfloat16", deepspeed=ZERO[2], precision="bfloat16", checkpoint_activations=True))
    run(stage_config("leap", job("handed", iterations=5)))
    jobs.append(job("handed", deepspeed=ZERO[2]))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    outcome = launch("tests/zero_worker.py", folder / "jobs.json")
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    return folder


@pytest.mark.parametrize(
    ("plain", "sharded"), [("plain", "zero1"), ("plain", "zero2"), ("lora", "lora2"), ("plain", "handed")]
)
def test_two_processes_train_as_one_does(runs, plain, sharded):
    worst = differences(runs / plain, runs / sharded)
    assert len(read_metrics(runs / sharded)) == 10 and max(worst.values()) < TOLERANCE, worst
    students = [
        load_pipeline(runs / name / "student", FVGenLeapPipeline).unet.state_dict() for name in (plain, sharded)
    ]
    gaps = {key: (x - students[1][key]).abs().max().item() for key, x in students[0].items()}
    assert max(gaps.values()) < 1e-4
    assert all(gap == 0 for key, gap in gaps.items() if "attn1" not in key)


def test_half_precision_trains(runs):
    rows = read_metrics(runs / "bfloat16")
    assert len(rows) == 10 and all(row["loss_student"] > 0 for row in rows)


def test_zero_three_is_refused(runs):
    sentence = (runs / "zero3.refused").read_text()
    assert "ZeRO-3 shards networks, and method leap needs them whole; take ZeRO-1 or 2" in sentence
