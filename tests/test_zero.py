"""DeepSpeed for real: two processes on the CPU, started by its launcher, against the plain engine.

All stages run in one launch, because starting takes longer than they do; the very first start on a machine compiles an
operator for a minute or more.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from zero_worker import train

from fvgen.distill import read_metrics, run, stage_config
from fvgen.models.viewcrafter.pipelines import FVGenPipeline
from fvgen.pipelines.folders import load_pipeline

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; pip install -e '.[train]'")
pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[1]
ZERO = {stage: str(REPOSITORY / "recipes" / "deepspeed" / f"zero{stage}.json") for stage in (1, 2, 3)}
TOLERANCE = 1e-5


def launch(*words: object, port: int | None = None) -> subprocess.CompletedProcess:
    """A script under DeepSpeed's launcher, with two processes."""
    launcher = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "PATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, launcher, "--num_accelerators", "2", "--master_port", port, *words]
    return subprocess.run(
        [str(word) for word in command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=3000
    )


@pytest.fixture(scope="module")
def runs(teacher_folder, clip_folder, tmp_path_factory) -> Path:
    """Both stages plain, then under each ZeRO stage, and some further settings."""
    folder = tmp_path_factory.mktemp("zero")
    common = {"teacher": str(teacher_folder), "data": str(clip_folder), "batch_size": 4, "head_channels": 8}
    # Small steps: Adam's first ones have the size of the learning rate whatever the gradient, so that rounding grows.
    common |= {"iterations": 20, "critic_updates": 1, "track": False, "checkpoint_every": 10, "head_lr": 1e-5}
    jobs = []

    def add(stage: str, name: str, **changes: object) -> dict:
        settings = {"method": stage, **common, "out": str(folder / f"{stage}-{name}")} | changes
        if stage == "dmd":
            settings |= {"init": str(folder / "gan-plain")}
        return settings

    for stage in ("gan", "dmd"):
        run(stage_config(stage, add(stage, "plain")))
        jobs += [add(stage, f"zero{z}", deepspeed=ZERO[z]) for z in ZERO]
    jobs.append(add("gan", "checkpointed", deepspeed=ZERO[3], checkpoint_activations=True, iterations=3))
    jobs.append(add("gan", "parts", deepspeed=ZERO[2], accumulation=2, iterations=3))
    narrow = {"precision": "bfloat16", "iterations": 3, "remember": True}
    train(add("dmd", "bfloat16", **narrow))
    jobs += [add("dmd", f"bfloat16{z}", deepspeed=ZERO[z], **narrow) for z in ZERO]
    jobs.append(add("dmd", "offloaded", deepspeed=ZERO[2], offload_teacher=True, iterations=3))
    jobs.append(add("gan", "diverging", deepspeed=ZERO[2], student_lr=1e30, iterations=8))
    jobs.append(add("gan", "odd", deepspeed=ZERO[2], batch_size=3))
    poison = {"poisoned": 0, "batch_size": 2, "iterations": 10, "max_skips": 10}  # one clip a process
    train(add("gan", "poisoned", **poison))
    jobs += [add("gan", f"poisoned{z}", deepspeed=ZERO[z], **poison) for z in ZERO]
    # ... half of it by the plain engine, the rest by two processes
    run(stage_config("dmd", add("dmd", "handed", iterations=10)))
    jobs.append(add("dmd", "handed", deepspeed=ZERO[3]))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    outcome = launch("tests/zero_worker.py", folder / "jobs.json")
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    return folder


def differences(one: Path, two: Path) -> dict[str, float]:
    """The largest relative difference of each loss."""
    worst: dict[str, float] = {}
    rows = read_metrics(one), read_metrics(two)
    for a, b in zip(rows[0][: len(rows[1])], rows[1], strict=True):
        assert a.keys() == b.keys()
        for key in (key for key in a if key.startswith("loss")):
            worst[key] = max(worst.get(key, 0), abs(a[key] - b[key]) / abs(a[key]))
    return worst


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("stage", ["gan", "dmd"])
def test_every_zero_stage_trains_as_one_process_does(runs, stage, zero):
    plain, sharded = runs / f"{stage}-plain", runs / f"{stage}-zero{zero}"
    assert len(read_metrics(sharded)) == 20
    worst = differences(plain, sharded)
    assert worst and max(worst.values()) < TOLERANCE, worst
    first = [read_metrics(folder)[0] for folder in (plain, sharded)]  # gradients too, before rounding has grown
    for key in set(first[0]) - {"student_std"}:  # the mean of the processes' spreads
        assert first[1][key] == pytest.approx(first[0][key], rel=TOLERANCE, abs=1e-7), key
    students = [load_pipeline(folder / "student", FVGenPipeline).unet.state_dict() for folder in (plain, sharded)]
    gap = max((a - b).abs().max().item() for a, b in zip(students[0].values(), students[1].values(), strict=True))
    assert gap < 5e-4


@pytest.mark.parametrize("name", ["checkpointed", "parts"])
def test_other_ways_to_save_memory_train_the_same(runs, name):
    worst = differences(runs / "gan-plain", runs / f"gan-{name}")
    assert max(worst.values()) < TOLERANCE, worst


def test_an_offloaded_teacher_teaches_the_same(runs):
    worst = differences(runs / "dmd-plain", runs / "dmd-offloaded")
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("zero", ["", *ZERO])
def test_bfloat16_is_near(runs, zero):
    worst = differences(runs / "dmd-plain", runs / f"dmd-bfloat16{zero}")
    assert 1e-4 < max(worst.values()) < 0.3, worst


@pytest.mark.parametrize("zero", ZERO)
def test_in_bfloat16_both_engines_start_from_the_same(runs, zero):
    plain, sharded = (torch.load(runs / f"dmd-bfloat16{z}.start") for z in ("", zero))
    types = {"student": torch.bfloat16, "head": torch.float32, "fake_score": torch.bfloat16}
    for name, (dtype, masters) in plain.items():
        assert dtype == sharded[name][0] == types[name], name
        assert all(torch.equal(master, sharded[name][1][key]) for key, master in masters.items()), name
        assert not all(torch.equal(master, master.bfloat16().float()) for master in masters.values()), name


def test_a_checkpoint_goes_on_at_another_number_of_processes(runs):
    worst = differences(runs / "dmd-plain", runs / "dmd-handed")
    assert len(read_metrics(runs / "dmd-handed")) == 20 and max(worst.values()) < TOLERANCE, worst


def test_one_process_goes_on_where_two_stopped(runs, tmp_path):
    settings = next(job for job in json.loads((runs / "jobs.json").read_text()) if job["out"].endswith("gan-zero3"))
    out = tmp_path / "alone"
    shutil.copytree(settings["out"], out)
    shutil.rmtree(out / "checkpoints" / "00000020")
    (out / "summary.json").unlink()
    run(stage_config("gan", settings | {"out": str(out), "deepspeed": ""}))
    worst = differences(runs / "gan-plain", out)
    assert len(read_metrics(out)) == 20 and max(worst.values()) < TOLERANCE, worst


def test_divergence_stops_all_processes_with_a_reason(runs):
    assert "is not finite at iteration" in (runs / "gan-diverging.refused").read_text()
    rows = read_metrics(runs / "gan-diverging")
    assert [("not_finite" in row) for row in rows] == [False, True, True, True]


@pytest.mark.parametrize("zero", ZERO)
def test_what_is_no_number_in_one_process_is_skipped_by_both(runs, zero):
    plain, sharded = (read_metrics(runs / f"gan-poisoned{z}") for z in ("", zero))
    skipped = ["not_finite" in row for row in plain]
    assert 0 < sum(skipped) < len(plain) and skipped == ["not_finite" in row for row in sharded]
    for a, b in zip(plain, sharded, strict=True):
        for key in a.keys() & b.keys() if "not_finite" not in a else ():
            if key.startswith("loss"):
                assert b[key] == pytest.approx(a[key], rel=TOLERANCE), key
    weights = load_pipeline(runs / f"gan-poisoned{zero}" / "student", FVGenPipeline).unet.state_dict()
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_batch_that_does_not_divide(runs):
    sentence = (runs / "gan-odd.refused").read_text()
    assert "batch_size=3 does not divide among 2 processes" in sentence
    assert not (runs / "gan-odd").exists()


def test_the_recipe_under_the_launcher(teacher_folder, clip_folder, tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text(
        f"teacher: {teacher_folder}\ndata: {clip_folder}\niterations: 2\nbatch_size: 2\nhead_channels: 8\n"
    )
    words = ["recipes/stage1_gan.py", "--config", config, "--deepspeed", ZERO[2], f"out={tmp_path / 'run'}"]
    outcome = launch(*words)
    assert outcome.returncode == 0, outcome.stdout[-2000:] + outcome.stderr[-2000:]
    assert outcome.stdout.replace("\n", "").count("Student after stage 1") == 1
    assert load_pipeline(tmp_path / "run" / "student", FVGenPipeline).config.steps == 4
    wrong = launch(*words, "seed=9")
    assert wrong.returncode != 0 and "holds another run (seed is 0 there and 9 here)" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_port_in_use(teacher_folder, clip_folder, tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text(f"teacher: {teacher_folder}\ndata: {clip_folder}\nbatch_size: 2\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "MASTER_PORT": str(port)}
        words = ["recipes/stage1_gan.py", "--config", config, "--deepspeed", ZERO[2], f"out={tmp_path / 'run'}"]
        outcome = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert outcome.returncode == 2 and f"fvgen: port {port} is in use by another run" in outcome.stderr
    assert "Traceback" not in outcome.stderr and not (tmp_path / "run").exists()


def test_a_process_that_dies_ends_the_run_and_says_why(runs, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, sys\n"
        "from fvgen.distill import Trainer, stage_config\n"
        f"settings = {dict(method='gan', out=str(tmp_path / 'run'), deepspeed=ZERO[2])!r}\n"
        f"settings |= {json.loads((runs / 'jobs.json').read_text())[0]!r} | settings\n"
        "trainer = Trainer(stage_config('gan', settings))\n"
        "if os.environ['RANK'] == '1':\n"
        "    raise MemoryError('no more room in process 1')\n"
        "trainer.train()\n"
    )
    outcome = launch(script)
    assert outcome.returncode != 0 and "no more room in process 1" in outcome.stderr
