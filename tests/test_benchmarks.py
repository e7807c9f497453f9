"""Benchmarks, as far as seconds allow: the port gives our outputs, the tiny preset runs, pages match their figures."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from conftest import REPOSITORY
from scene_files import write_colmap

from fvgen.errors import UserError
from fvgen.scenes.formats import read_scene
from fvgen.scenes.images import fit_image
from fvgen.shards.encoders import RenderNeeds


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))


@pytest.mark.parametrize("shared_tokens", [False, True])
def test_the_port_of_the_original_operations_gives_our_outputs(shipped, shared_tokens):
    row = import_module("unet_ops").compare(batch=1, repeats=1, shared_tokens=shared_tokens)
    assert row["largest_difference"] < 1e-4 and row["ours_ms"] > 0


def test_full_size_runs_at_tiny_size(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["full_size.py", "--preset", "tiny", "--out", str(out)])
    import_module("full_size").main()
    result = json.loads(out.read_text())
    assert result == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["what"] for row in result["rows"]][1:] == ["forward", "forward and backward, activation checkpointing"]
    assert all(row["seconds"] > 0 and row["peak_gib"] > 0 for row in result["rows"])
    assert f"{result['parameters']:,} parameters" in out.with_suffix(".md").read_text()


def gpu_check(out, monkeypatch, *words: str) -> int:
    """Its exit code, rehearsed on the CPU."""
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--preset", "tiny", "--out", str(out), *words])
    try:
        import_module("gpu_check").main()
    except SystemExit as end:
        return end.code
    return 0


def test_the_gpu_check_leaves_rows_and_a_page(tmp_path, monkeypatch, capsys):
    assert gpu_check(tmp_path, monkeypatch, "--parts", "forward", "gaussians") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["state"] for row in summary["parts"]["overview"]] == ["done", "skipped"]
    forward = json.loads((tmp_path / "forward.json").read_text())
    assert [row["clip"] for row in forward["rows"]] == ["2x64x64", "3x64x128", "2x64x64"]
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in forward["rows"]) and forward["rows"][0]["tflop"] > 0
    page = (tmp_path / "README.md").read_text()
    assert "| 3x64x128 |" in page and "gsplat is not installed" in page


def test_a_part_that_is_cut_leaves_what_it_had(tmp_path, monkeypatch):
    check = import_module("gpu_check")
    monkeypatch.setitem(check.PARTS, "renderer", check.Part(check.renderer, 0))
    assert gpu_check(tmp_path, monkeypatch, "--parts", "renderer") == 1
    cut = json.loads((tmp_path / "renderer.json").read_text())
    assert (cut["state"], cut["why"], cut["rows"]) == ("cut", "not done after 0 s", [])
    report = check.Report(tmp_path / "x.json", "cpu", "tiny")
    report.add(seconds=1.0)
    assert json.loads((tmp_path / "x.json").read_text()) == {"state": "running", "rows": [{"seconds": 1.0}]}


def test_the_gpu_check_compares_with_what_was_predicted(tmp_path):
    check = import_module("gpu_check")
    row = {"clip": "16x320x512", "seconds": 2.0, "peak_gb": 10.0}
    for name, rows in (
        ("iteration", [row]),
        ("predictions", [{"clip": row["clip"], "predicted_gb": 9.5, "tflop": 989}]),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"state": "done", "rows": rows}))
    parts = check.summary(tmp_path, {"peak_tflops": 989.0})["parts"]
    assert parts["iteration"][0]["error"] == "-5.0 %" and parts["iteration"][0]["utilisation"] == "50.0 %"


def test_the_gpu_check_is_over_within_nine_minutes():
    check = import_module("gpu_check")
    assert sum(part.limit for part in check.PARTS.values()) < 540 > max(part.limit for part in check.BESIDE.values())


@pytest.mark.slow
def test_the_gpu_check_as_it_is_started():
    command = ["make", "gpu-check", "DEVICE=cpu", "SIZE=tiny", f"PYTHON={sys.executable}"]
    outcome = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    states = {row["part"]: row["state"] for row in json.loads(outcome.stdout.splitlines()[-1])["parts"]["overview"]}
    assert outcome.returncode == 0, outcome.stdout
    check = import_module("gpu_check")
    assert states.keys() == {*check.PARTS, *check.BESIDE}
    assert states.pop("gaussians") == "skipped" and set(states.values()) == {"done"}


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("prepare", ""),
        ("points", ""),
        ("consistency", ""),
        ("speed-tiny", "speed"),
        ("table1_novel_view-tiny", "table1_novel_view"),
    ],
)
def test_pages_say_what_was_measured(name, script):
    """Nobody has edited one without the other, and the pages of past runs can still be written."""
    results = REPOSITORY / "benchmarks" / "results" / name
    page = import_module(script or name).note(json.loads(results.with_suffix(".json").read_text()))
    assert page == results.with_suffix(".md").read_text()


def test_a_row_of_speed_is_medians_and_ratios_of_the_same_clip():
    speed = import_module("speed")
    few = [{"encode": 0.1, "sample": sample, "decode": 0.1} for sample in (0.3, 0.8, 0.2)]
    row = speed.row_of("student, 4 steps", 4, few, [10.0, 10.0, 10.0], 8)
    assert (row["sample_s"], row["clip_s"], row["frames_per_s"]) == (0.3, 0.5, 16.0)
    assert row["teacher_over_this"] == 20.0 and row["share_of_sampling"] == 0.6
    found = [speed.claim_of([10.0, 10.0], each)["found here"] for each in ([0.5, 0.51], [2.0, 2.01], [0.5, 1.6])]
    assert found == ["reproduced", "not reproduced", "undecided"]


def test_speed_times_every_way_on_every_clip(shipped):
    """One step each: as many times as clips that count, and parts that a clock took."""
    from fvgen.clips.builtin import builtin_clips

    speed = import_module("speed")
    teacher, _ = speed.load(str(shipped), None, "cpu")
    contestants = speed.contestants_of(teacher, None, [1])
    contestants[speed.TEACHER] = speed.teacher_contestant(teacher, 1)
    assert [each.nfe for each in contestants.values()] == [2, 1]
    times = speed.measure_seconds(contestants, [builtin_clips("test", 1)[0]] * 3, teacher)
    assert list(times) == ["teacher", "student, 1 step", "render"] and all(len(each) == 2 for each in times.values())
    assert all(value > 0 for each in times.values() for parts in each for value in parts.values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is read from /proc")
def test_a_guided_pass_needs_more_memory_than_a_plain_one():
    """Both conditions go through the network at once."""
    from fvgen.clips.builtin import builtin_clips

    given = {"teacher": "tiny", "student": None, "device": "cpu"}
    peaks = import_module("speed").measure_peaks(
        ["teacher", "student, 1 step"], [1], given, builtin_clips("test", 1)[0]
    )
    assert peaks["teacher"] > peaks["student, 1 step"] > 0


def test_table_1_of_a_scene_with_a_split(tmp_path):
    """Views that are given are the photographs and are not scored; the others are the scene's own, in order."""
    table = import_module("table1_novel_view")
    write_colmap(tmp_path / "room")
    needs = RenderNeeds(4, 48, 64, 0.03, False)
    split = {"room": {"context": [0, 2], "target": [1]}}
    case = table.of_scene(tmp_path / "room", split, 2, 4, needs, "auto")
    scene = read_scene(tmp_path / "room")
    assert case.rendered.known.tolist() == [True, False, True]
    for view in range(3):
        assert torch.equal(case.truth[view], fit_image(scene.image(view), 48, 64))
    faded = table.cross_fade(case)
    torch.testing.assert_close(faded[1], (case.truth[0] + case.truth[2]) / 2)
    assert torch.equal(faded[::2], case.truth[::2])
    plain = table.of_scene(tmp_path / "room", None, 2, 3, needs, "auto")
    assert plain.rendered.known.tolist() == [True, False, True]
    for wrong, words in (
        ({}, "no lists"),
        ({"room": {"context": [0, 99], "target": [1]}}, "of views 0 to"),
        ({"room": {"context": [0], "target": [1]}}, "gives 1 views of room"),
    ):
        with pytest.raises(UserError, match=words):
            table.of_scene(tmp_path / "room", wrong, 2, 4, needs, "auto")
