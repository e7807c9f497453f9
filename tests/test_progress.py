"""How far a stage is, told to who is not at a terminal."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import processes
import pytest
import yaml

from fvgen.distill import changed, run
from fvgen.distill.progress import ProgressLines, brief

LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d stage gan (\d+)/(\d+) head \d\.\d\d gan \d\.\d\d \d:\d\d:\d\d left \d:\d\d:\d\d"


def told(text: str) -> list[tuple[int, int]]:
    """(iteration, of how many) of every line."""
    found = [re.fullmatch(LINE, line) for line in text.splitlines()]
    assert all(found), text
    return [(int(line[1]), int(line[2])) for line in found]


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_a_line_at_once_then_every_few_seconds_and_at_the_end(tmp_path, clock, capsys, monkeypatch):
    monkeypatch.setenv("FVGEN_PROGRESS", "1")
    lines = ProgressLines(tmp_path, "gan", done=20, total=50, every=10.0)
    for iteration in range(21, 51):
        clock[0] += 3
        lines.tell(iteration, "D 1.00", last=iteration == 50)
    out = (tmp_path / "log.txt").read_text()
    assert capsys.readouterr().err == out
    assert [int(re.search(r"gan (\d+)/50", line)[1]) for line in out.splitlines()] == [21, *range(25, 50, 4), 50]
    assert out.splitlines()[0].endswith("gan 21/50 D 1.00 0:00:03 left 0:01:27")
    assert out.splitlines()[-1].endswith("gan 50/50 D 1.00 0:01:30 left 0:00:00")


@pytest.mark.parametrize(
    ("variable", "terminal", "heard"), [("1", False, True), ("1", True, False), ("0", False, False)]
)
def test_stderr_is_for_who_has_no_terminal(tmp_path, capsys, monkeypatch, variable, terminal, heard):
    monkeypatch.setenv("FVGEN_PROGRESS", variable)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    ProgressLines(tmp_path, "gan", 0, 1).tell(1, "", last=True)
    assert bool(capsys.readouterr().err) == heard and (tmp_path / "log.txt").is_file()


def test_a_log_that_cannot_be_written_is_not_worth_a_run(tmp_path):
    ProgressLines(tmp_path / "nowhere", "gan", 0, 1).tell(1, "", last=True)


def test_a_stage_tells_how_far_it_is_and_goes_on_telling(stage, clock, capsys, monkeypatch):
    monkeypatch.delenv("FVGEN_PROGRESS")
    config = stage(iterations=3)
    run(config)
    err = capsys.readouterr().err
    assert told(err) == [(1, 3), (3, 3)]
    run(changed(config, iterations=5))
    log = (Path(config.run.out) / "log.txt").read_text()
    assert told(log) == [(1, 3), (3, 3), (4, 5), (5, 5)] and log == err + capsys.readouterr().err


def test_a_recipe_is_heard_on_stderr_unless_it_is_told_to_be_silent(stage, tmp_path):
    assert os.environ["FVGEN_PROGRESS"] == "0"  # so that other tests find on stderr what went wrong, and nothing else
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(stage(iterations=2).words()))
    outcome = processes.run(["recipes/stage1_gan.py", "--config", settings], tmp_path)
    assert (outcome.code, outcome.err) == (0, "")
    assert told((Path(stage().run.out) / "log.txt").read_text()) == [(1, 2), (2, 2)]  # however long they took


def test_losses_in_brief():
    assert brief({"loss_head": 1.234, "loss_student_dmd": 0.5, "other": 9.0}, 0) == "head 1.23 dmd 0.50"
    assert brief({"not_finite": ["loss_head"], "loss_student_gan": 0.7}, 3) == "gan 0.70 skipped 3"
