"""How a run ends early: on a signal with everything saved, or because its numbers stay broken."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import processes
import pytest
import yaml

from fvgen.distill import read_metrics
from fvgen.distill.guards import SKIPPED, SkipGuard, finite_row, stop_on_sigterm
from fvgen.errors import UserError


def test_rows_keep_the_numbers_and_name_the_others():
    assert finite_row({"a": 1.0, "b": 2.0}) == {"a": 1.0, "b": 2.0}
    assert finite_row({"a": float("nan"), "b": 2.0, "c": float("inf")}) == {"b": 2.0, SKIPPED: ["a", "c"]}


def test_only_bad_iterations_in_a_row_stop():
    good, bad = {"a": 1.0}, {SKIPPED: ["grad_norm_head"]}
    guard = SkipGuard(3, [bad, good, bad])
    for row in (bad, good, bad, bad):
        guard.judge(row, 1)
    assert guard.total == 5
    with pytest.raises(UserError, match="grad_norm_head is not finite at iteration 9, the last of 3 in a row"):
        guard.judge(bad, 9)


def test_sigterm_sets_a_flag_and_nothing_else():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_while_the_student_is_written(stage, tmp_path):
    config = stage(iterations=2)
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(config.words()))
    words, out = ["recipes/stage1_gan.py", "--config", settings], Path(config.run.out)
    command = processes.Command(words, tmp_path)
    while command.running() and not list(out.glob("student.partial*")):
        time.sleep(0.0005)
    os.kill(command.process.pid, signal.SIGTERM)
    outcome = command.finish()
    assert (outcome.code, outcome.err) == (0, "fvgen: stopped by SIGTERM; the same command goes on\n")
    assert not list(out.rglob("*.partial*")) and not (out / "summary.json").exists()
    assert processes.run(words, tmp_path).code == 0 and (out / "summary.json").exists()


def test_a_run_that_is_told_to_stop_saves_and_goes_on_later(stage, tmp_path):
    whole = stage(iterations=6, checkpoint_every=100, out=str(tmp_path / "whole"))
    for_whole = tmp_path / "whole.yaml"
    for_whole.write_text(yaml.safe_dump(whole.words()))
    # In a process of its own, as the other: a test before this one may have left this process with fewer threads.
    assert processes.run(["recipes/stage1_gan.py", "--config", for_whole], tmp_path).code == 0
    config = stage(iterations=6, checkpoint_every=100, out=str(tmp_path / "told"))
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(config.words()))
    words, log = ["recipes/stage1_gan.py", "--config", settings], Path(config.run.out) / "metrics.jsonl"
    command = processes.Command(words, tmp_path)
    while command.running() and not (log.exists() and log.read_bytes().count(b"\n") >= 2):
        time.sleep(0.0005)
    os.kill(command.process.pid, signal.SIGTERM)
    outcome = command.finish()
    assert outcome.code == 0 and "stopped by SIGTERM after iteration" in outcome.err
    done = len(read_metrics(config.run.out))
    assert 2 <= done < 6 and f"after iteration {done}; the same command resumes" in outcome.err
    assert (Path(config.run.out) / "checkpoints" / f"{done:08d}").is_dir()
    assert processes.run(words, tmp_path).code == 0
    for name in ("metrics.jsonl", "student/unet/diffusion_pytorch_model.safetensors"):
        assert (Path(config.run.out) / name).read_bytes() == (Path(whole.run.out) / name).read_bytes()
