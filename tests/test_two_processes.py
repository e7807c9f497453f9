"""Both stages under DeepSpeed's ZeRO-2 on two processes, a few iterations each: the main way to train, always tested.

tests/test_zero.py (slow) has all ZeRO stages and what can go wrong.
"""

from __future__ import annotations

import json

import pytest
import torch
from test_zero import TOLERANCE, ZERO, differences, launch

from fvgen.distill import read_metrics, run, stage_config
from fvgen.pipelines.folders import load_pipeline
from fvgen.pipelines.student import StudentPipeline

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; pip install -e '.[train]'")


def test_two_processes_train_both_stages_as_one_does(teacher_folder, clip_folder, tmp_path):
    common = {"teacher": str(teacher_folder), "data": str(clip_folder), "batch_size": 2, "head_channels": 8}
    common |= {"iterations": 3, "critic_updates": 1, "track": False, "sample_every": 0, "head_lr": 1e-5}
    jobs = []
    for method in ("gan", "dmd"):
        start = {"init": str(tmp_path / "gan-plain")} if method == "dmd" else {}
        run(stage_config(method, common | start | {"out": str(tmp_path / f"{method}-plain")}))
        jobs.append(
            {"method": method, **common, **start, "out": str(tmp_path / f"{method}-zero"), "deepspeed": ZERO[2]}
        )
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    outcome = launch("tests/zero_worker.py", tmp_path / "jobs.json")
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    for method in ("gan", "dmd"):
        plain, sharded = tmp_path / f"{method}-plain", tmp_path / f"{method}-zero"
        assert len(read_metrics(sharded)) == 3
        assert max(differences(plain, sharded).values()) < TOLERANCE
        one, two = (load_pipeline(folder / "student", StudentPipeline).network for folder in (plain, sharded))
        # Adam's first steps turn rounding into signs: a few learning rates.
        for name, tensor in one.state_dict().items():
            torch.testing.assert_close(two.state_dict()[name], tensor, rtol=0, atol=6 * 5e-5)
