"""Runs that were made to collapse, each in one way, and what is said of them; healthy runs, of which nothing is said.

Most are of the smallest teacher that there is, the one of docs/extending.md: two convolutions, in pixels.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import refusal

import fvgen
from fvgen import calls
from fvgen.diagnosis import Diagnosis, diagnose
from fvgen.diagnosis.diagnose import diagnosis_of, text_of
from fvgen.diagnosis.evidence import share_interval
from fvgen.diagnosis.patterns import LEVELS, PATTERNS
from fvgen.diagnosis.series import Sample, Series
from fvgen.distill import Trainer, changed, read_yaml, run, stage_config
from fvgen.distill.methods import METHODS, Row
from fvgen.distill.methods.dmd import Dmd
from fvgen.distill.methods.dmd_settings import DmdSettings
from fvgen.errors import UserError
from fvgen.models import family

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pixels(tmp_path_factory) -> Iterator[Path]:
    """The folder of a teacher of docs/extending.md, whose family is known while these tests run."""
    blocks = re.findall(r"```python\n# my_teacher.py\n(.*?)```", (REPOSITORY / "docs/extending.md").read_text(), re.S)
    module, before = types.ModuleType("my_teacher"), dict(family._REGISTERED)
    sys.modules["my_teacher"] = module
    exec(compile(blocks[0], "my_teacher.py", "exec"), module.__dict__)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "pixels"
    module.MyTeacher(module.TwoConvolutions()).save_pretrained(folder)
    yield folder
    family._REGISTERED.clear()
    family._REGISTERED.update(before)
    del sys.modules["my_teacher"]


@pytest.fixture
def settings(pixels, clip_folder, tmp_path) -> Callable[..., Any]:
    """Settings of a stage as the tiny preset has them, but for the teacher's size and a dozen iterations."""

    def make(name: str, method: str = "", **changes: Any) -> Any:
        preset = read_yaml(REPOSITORY / "src/fvgen/configs/tiny.yaml")
        both = {key: value for key, value in preset.items() if key not in ("gan", "dmd", "clips", "checkpoint_every")}
        small = {"teacher": str(pixels), "data": str(clip_folder), "out": str(tmp_path / "run"), "track": False}
        small |= {"iterations": 12, "head_channels": 8, "ema_decay": 0.9}
        small |= {"head_warmup": 2} if name == "gan" else {}
        words = both | preset[name] | small | changes
        return stage_config(method or name, {key: value for key, value in words.items() if value is not None})

    return make


def seen(config: Any) -> tuple[Diagnosis, list[str]]:
    """The diagnosis of a run, once it has ended in whatever way."""
    try:
        run(config)
    except UserError as error:
        assert "diverged" in str(error)
    (found,) = diagnose(config.run.out)
    return found, [finding.pattern for finding in found.findings]


HARD = {"critic_updates": 10, "head_lr": 0.03, "student_lr": 1e-6}  # on the student: a head far ahead of it

PROVOKED = {  # method of the preset, another row of the table, settings
    "learning rate beyond: student": ("gan", "", {"student_lr": 1.0}),
    "learning rate beyond: head": ("gan", "", {"head_lr": 10.0, "gan_kind": "non_saturating"}),
    "learning rate beyond: fake score": ("dmd", "", {"fake_score_lr": 3.0}),
    "one colour": ("gan", "", {"student_lr": 0.003, "weight_decay": 300.0, "student_steps": 1}),
    "seeds agree": ("gan", "", {"student_lr": 0.003, "weight_decay": 300.0, "student_steps": 1, "sample_every": 1}),
    "head has won": ("gan", "", HARD),
    "head prefers the student's clips": ("gan", "control-frozen-head", {"student_lr": 3e-3, "iterations": 24}),
    "head learns nothing": ("gan", "", {"t_min": 990, "t_max": 999}),  # noise hides all
    "student does not heed the head": ("gan", "control-random-gradient", {"iterations": 40, "head_lr": 0.01}),
    "density ratio saturated": ("dmd", "", HARD | {"divergence": "softened_reverse_kl"}),
    "fake score behind": ("dmd", "", {"fake_score_lr": 0.5}),
    "matching says nothing": ("dmd", "", {"fake_score_lr": 1e-9}),
    "matching is thrown about": ("dmd", "", {"fake_score_lr": 3.0}),
    "matching is drowned": ("dmd", "", {"gan_weight": 100.0}),
    "brightness drift": ("gan", "brighter", {"student_lr": 0.01, "student_steps": 1, "iterations": 30}),
    "contrast drift": ("gan", "louder", {"student_lr": 0.0003, "student_steps": 1, "iterations": 40}),
    "average lags": ("gan", "", {"ema_decay": 0.999}),
    "updates skipped": ("gan", "broken", {"head_lr": 1e-3}),
    "diverged": ("gan", "lost", {}),
}


class Brighter(Dmd):
    """What its own objective asks for."""

    def student_losses(self, rollout, draws, seen):
        losses, metrics = super().student_losses(rollout, draws, seen)
        return [0.01 * losses[0], (rollout.x0 - 0.9).square().mean()], metrics


class Louder(Dmd):
    """... or gives, where no critic weighs it."""

    def student_losses(self, rollout, draws, seen):
        losses, metrics = super().student_losses(rollout, draws, seen)
        return [0.01 * losses[0], (rollout.x0.std() - 0.3).square()], metrics


class Broken(Dmd):
    """A batch now and then of which nothing can be computed."""

    bad = (4, 9)

    def iterate(self, iteration, deal):
        self.now = iteration
        return super().iterate(iteration, deal)

    def student_losses(self, rollout, draws, seen):
        losses, metrics = super().student_losses(rollout, draws, seen)
        return [loss * (torch.nan if self.now in self.bad else 1) for loss in losses], metrics


class Lost(Broken):
    bad = range(6, 100)


@pytest.fixture
def own_methods(monkeypatch) -> None:
    for kind in (Brighter, Louder, Broken, Lost):
        monkeypatch.setitem(METHODS, kind.__name__.lower(), Row(kind, DmdSettings, {"dmd_weight": 0.0}))


@pytest.mark.parametrize("pattern", PROVOKED)
def test_a_run_made_to_collapse_is_recognised(settings, own_methods, pattern):
    name, method, changes = PROVOKED[pattern]
    found, names = seen(settings(name, method, **changes))
    assert pattern in names and not found.healthy, text_of(found)
    (finding,) = (each for each in found.findings if each.pattern == pattern)
    assert re.search(r"\d", finding.evidence) and finding.cause and finding.cure


def test_a_still_student_is_recognised(stage):
    """Weights that decay tenfold an iteration leave latents of nothing, and the padding of this teacher's random
    decoder makes one picture of them that does not move: not one colour."""
    found, names = seen(stage(student_lr=0.003, weight_decay=300.0, student_steps=1, iterations=12, ema_decay=0.5))
    assert "static video" in names and "one colour" not in names, text_of(found)
    assert "change from frame to frame 0 of 255" in text_of(found)


def test_rows_that_are_missing_are_recognised(settings):
    config = settings("gan")
    run(config)
    log = Path(config.run.out) / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:3] + lines[6:]))
    (found,) = diagnose(config.run.out)
    assert [each.pattern for each in found.findings] == ["resume gap"]
    assert found.findings[0].evidence.startswith("3 of 12 iterations are missing in metrics.jsonl: 4 to 6")


def test_work_that_was_done_twice_is_recognised(settings, monkeypatch):
    config = settings("gan")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", lambda self, iteration: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(changed(config, checkpoint_every=7))
    run(config)
    (found,) = diagnose(config.run.out)
    assert [each.pattern for each in found.findings] == ["work done twice"]
    assert found.findings[0].evidence.startswith("7 iterations were done again after 1 restarts, 58%")


def test_half_of_the_seconds_is_the_limit_of_waiting():
    for waited, names in ((0.4, []), (0.6, ["waits for clips"])):
        rows = [{"iteration": k, "seconds": 1.0, "data_seconds": waited} for k in range(1, 9)]
        assert [each.pattern for each in diagnosis_of(Series("x", {}, rows)).findings] == names


# --- Healthy runs ---


@pytest.mark.parametrize("seed", range(3))
def test_short_healthy_runs_are_called_healthy(settings, teacher_folder, tmp_path, seed):
    for name in ("gan", "dmd"):
        start = {"init": str(tmp_path / "gan")} if name == "dmd" else {}
        config = settings(name, teacher=str(teacher_folder), out=str(tmp_path / name), seed=seed, **start)
        found, _ = seen(config)
        assert found.healthy and not found.untold and not found.notes, text_of(found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_presets_own_teacher_at_work_is_called_healthy(settings, shipped, tmp_path, seed):
    for name in ("gan", "dmd"):
        start = {"init": str(tmp_path / "gan")} if name == "dmd" else {"head_warmup": 4}
        shown = {"teacher": "tiny", "data": "builtin", "clips": 64, "out": str(tmp_path / name), "head_channels": 64}
        found, _ = seen(settings(name, seed=seed, iterations=14, **shown, **start))
        assert found.healthy and not found.untold, text_of(found)


def recordings() -> list[Series]:
    """Three seeds of both stages of the tiny preset, whole: every number that a pattern reads, but no pictures. (Of
    loss_student only where there is one.)"""
    found = []
    for line in (REPOSITORY / "tests/recorded/preset_runs.jsonl").read_text().splitlines():
        recorded = json.loads(line)
        rows = [
            {key: value for key, value in zip(recorded["columns"], values, strict=True) if value is not None}
            for values in zip(*recorded["columns"].values(), strict=True)
        ]
        name = f"{recorded['settings']['method']}{recorded['settings']['seed']}"
        found.append(Series(name, recorded["settings"], rows, finished=True))
    return found


@pytest.mark.parametrize("series", recordings(), ids=lambda series: series.name)
def test_whole_runs_of_the_preset_are_called_healthy(series):
    found = diagnosis_of(series)
    assert found.healthy, text_of(found)
    assert {name for name, _ in found.untold} == {"one colour", "static video", "brightness drift"}


# --- The numbers ---


def clips(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(*shape, 3)).astype(np.float32)


def test_pictures_are_judged_beside_the_true_clip():
    truth = clips(4, 8, 8)
    still = np.broadcast_to(truth[:1], (2, *truth.shape))
    flat = np.broadcast_to(truth.mean((1, 2), keepdims=True), (2, *truth.shape))
    dark = np.stack([truth, truth]) * 0.7  # brightness .35: a mean of 1/2 lost .15
    fine = np.stack([truth, truth])
    expected = {"static video": still, "one colour": flat, "brightness drift": dark, "": fine}
    for pattern, shown in expected.items():
        series = Series("x", {}, [{"iteration": 1}], last=Sample(1, shown), truth=truth)
        assert [each.pattern for each in diagnosis_of(series).findings] == ([pattern] if pattern else [])
    alone = Series("x", {}, [{"iteration": 1}], last=Sample(1, flat))  # no truth is known: one grey level is the limit
    assert [each.pattern for each in diagnosis_of(alone).findings] == ["one colour"]
    grey = np.full((4, 8, 8, 3), 0.5, np.float32)  # a true clip that is flat and still asks for nothing else
    series = Series("x", {}, [{"iteration": 1}], last=Sample(1, np.stack([grey, grey])), truth=grey)
    assert not diagnosis_of(series).findings


def test_the_interval_of_a_share_is_wilsons():
    for right, of in ((0.21, 60), (0.5, 10), (1.0, 24)):  # its ends are where the normal test just rejects
        for end in share_interval(right, of):
            assert abs(right - end) == pytest.approx(1.959964 * (end * (1 - end) / of) ** 0.5, rel=1e-5)
    assert share_interval(0.5, 0) == (0, 1)


def test_the_most_serious_comes_first_and_every_row_says_all():
    assert len({pattern.name for pattern in PATTERNS}) == len(PATTERNS) > 20
    rows = [{"iteration": 1, "not_finite": ["x"]}, {"iteration": 5, "not_finite": ["x"]}]
    levels = [each.level for each in diagnosis_of(Series("x", {"iterations": 9, "max_skips": 2}, rows)).findings]
    assert levels == sorted(levels, key=LEVELS.index) and set(levels) == {"lost", "harm"}
    table = (REPOSITORY / "docs/diagnose.md").read_text()
    for pattern in PATTERNS:
        cells = (pattern.name, pattern.level, pattern.limit, pattern.cause, pattern.cure)
        assert all(cells) and f"| {' | '.join(cells)} |" in table, cells


# --- Folders as they are found ---


def test_half_a_run_says_what_it_can(settings, tmp_path):
    config = settings("gan", sample_every=0, iterations=7)
    run(config)
    out = Path(config.run.out)
    (out / "summary.json").unlink()
    log = out / "metrics.jsonl"
    log.write_text(log.read_text()[:-20])
    (found,) = diagnose(out)
    assert not found.finished and (found.iterations, found.planned) == (6, 7)
    assert dict(found.untold) == {
        name: "without samples" for name in ("one colour", "static video", "brightness drift")
    } | {"seeds agree": "without seed_spread"}
    said = " ".join(found.notes)
    assert "the last line of metrics.jsonl is cut off" in said and "there are no sample clips" in said
    assert "cannot be told without samples: one colour, static video, brightness drift" in text_of(found)


def test_other_versions_and_damage_are_read_as_far_as_they_go(settings, tmp_path):
    out = Path(settings("gan", iterations=6, sample_every=3).run.out)
    run(settings("gan", iterations=6, sample_every=3))
    file = out / "config.yaml"
    words = file.read_text()
    file.write_text(re.sub(r"(?m)^fvgen: .*$", "fvgen: 0.0.7", words) + "a_setting_of_old: 3\n")
    assert "fvgen 0.0.7 wrote this run" in " ".join(diagnose(out)[0].notes)
    for text in ("a: [", "just words", ""):
        file.write_text(text)
        assert "config.yaml" in " ".join(diagnose(out)[0].notes)
    (out / "samples/00000006.png").write_bytes(b"no picture")
    (out / "monitor.jsonl").write_text('[1]\n{"iteration": "one"}\n\0\n{"iteration": 2, "seed_spread": 1e999}\n')
    notes = " ".join(diagnose(out)[0].notes)
    assert (
        "samples/00000006.png cannot be read" in notes
        and "monitor.jsonl has 3 damaged lines, the first is line 1" in notes
    )
    (out / "metrics.jsonl").unlink()
    shutil.rmtree(out / "samples")
    assert "metrics.jsonl cannot be read" in " ".join(diagnose(out)[0].notes)
    (out / "monitor.jsonl").unlink()
    (found,) = diagnose(out)
    assert not found.healthy and not found.findings and found.looked == 0  # nothing is said of nothing


def test_the_command_tells_people_and_programs(settings, capsys):
    config = settings("gan", ema_decay=0.999)
    run(config)
    capsys.readouterr()
    calls.diagnose(Path(config.run.out), as_json=False)
    said = capsys.readouterr().out
    assert re.search(r"HARM: average lags\. ema_decay 0\.999 and 10 updates .* leave 99%", said)
    calls.diagnose(Path(config.run.out), as_json=True)
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert stage["findings"][0]["value"] == pytest.approx(0.999**10) and not stage["healthy"]
    assert fvgen.diagnose(config.run.out)[0].as_json() == stage
    parent = Path(config.run.out).parent  # as a demo's, or that of recipes/distill.py
    assert [each.run for each in diagnose(parent)] == [config.run.out]


def test_what_is_no_run_is_refused(tmp_path):
    assert "holds no run" in refusal(lambda: diagnose(tmp_path))
    assert "is no folder" in refusal(lambda: diagnose(tmp_path / "none"))
    (tmp_path / "file").touch()
    assert "is no folder" in refusal(lambda: diagnose(tmp_path / "file"))
