"""`fvgen report`: which runs are one method, what stands on the page, and that it works in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from browser import MISSING, browser
from checks import refusal
from scipy import stats
from test_report import Page

from fvgen.distill import run, stage_config
from fvgen.metrics import score_images
from fvgen.reports.comparison import differences, numbers, quality, scored_rows
from fvgen.reports.page import ReportClip, write_report
from fvgen.reports.runs import grouped, read_runs
from fvgen.reports.runs_page import chart, held_out, report, samples


@pytest.fixture(scope="module")
def stages(teacher_folder, clip_folder, tmp_path_factory) -> list[Path]:
    """Two seeds of a short stage, and one with another rate."""
    folder, found = tmp_path_factory.mktemp("stages"), []
    for name, changes in (("a", {}), ("b", {"seed": 1}), ("c", {"student_lr": 1e-4})):
        settings = {"out": str(folder / name), "teacher": str(teacher_folder), "data": str(clip_folder)}
        settings |= {"iterations": 6, "batch_size": 2, "head_channels": 8, "critic_updates": 1, "track": False}
        run(stage_config("gan", settings | {"ema_decay": 0.5} | changes))
        found.append(folder / name)
    return found


def demo(folder: Path, stage: Path, seed: int, better: float = 0.0) -> Path:
    """What a demo leaves, made up, around a real stage: ``seed`` sets its noise, ``better`` its student's quality."""
    shutil.copytree(stage, folder / "stage1_gan")
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(3 * 4, 3, 16, 24, generator=torch.Generator().manual_seed(9))
    rows, videos = {}, {"truth": truth}
    noise = {"render": 0.5, "teacher": 0.2, "teacher_few": 0.3, "gan_init": 0.28, "student": 0.25 - better}
    evaluations = dict(zip(noise, (0, 12, 4, 4, 4), strict=True))
    for name, size in noise.items():
        videos[name] = (truth + size * torch.randn(truth.shape, generator=generator)).clamp(0, 1)
        scores = score_images(videos[name], truth, clip_of=torch.arange(12) // 4)
        rows[name] = {"steps": evaluations[name], "nfe": evaluations[name], "seconds_per_clip": 0.1} | scores
    clips = [ReportClip(f"clip-{k}", {n: v[4 * k : 4 * k + 4] for n, v in videos.items()}, (0, 3)) for k in range(3)]
    facts = {"data": "blobs", "clips": 3, "scenes": ["one"], "frames": 4, "height": 16, "width": 24, "seed": seed}
    stage_facts = [{"name": "gan", "iterations": 6, "seconds": 1.0}]
    write_report(folder, facts | {"device": "cpu", "rows": rows, "speedup": 3.0, "stages": stage_facts}, clips, {})
    return folder


@pytest.fixture(scope="module")
def demos(stages, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("demos")
    given = [("one", stages[0], 0, 0.0), ("two", stages[1], 1, 0.0), ("other", stages[2], 0, 0.05)]
    return [demo(folder / name, *rest) for name, *rest in given]


def test_seeds_are_one_method_and_settings_another(stages):
    groups = grouped(read_runs(stages))
    assert [(group.label, [run.seed for run in group.runs]) for group in groups] == [
        ("gan (student_lr=5e-05)", [0, 1]),
        ("gan (student_lr=0.0001)", [0]),
    ]
    assert [group.label for group in grouped(read_runs(stages[:2]))] == ["gan"]


def test_numbers_are_means_over_seeds_with_students_interval(demos):
    groups = grouped(read_runs(demos[:2]))
    reports = [json.loads((place / "report.json").read_text()) for place in demos[:2]]
    header, body = numbers(scored_rows(groups))
    cells = {row.label: dict(zip(header, each, strict=True)) for row, each in body}
    values = [each["rows"]["student"]["psnr"] for each in reports]
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert cells["Student"]["PSNR ↑"].text == f"{sum(values) / 2:.2f}"
    assert cells["Student"]["PSNR ↑"].half == f"± {(interval.high - interval.low) / 2:.2f}"
    assert "FID ↓" not in header and cells["Student"]["Steps"].half == ""
    others = [each["rows"]["teacher_few"]["psnr"] for each in reports]
    interval = stats.ttest_rel(values, others).confidence_interval(0.95)
    found = {label: (by, dict(row)) for label, by, row in differences(groups)}
    by, row = found["Student minus teacher, few steps"]
    assert by == "seed" and row["PSNR ↑"].half == f"± {(interval.high - interval.low) / 2:.2f}"


def test_one_run_has_intervals_over_its_clips(demos):
    groups = grouped(read_runs(demos[:1]))
    row = json.loads((demos[0] / "report.json").read_text())["rows"]["student"]
    interval = stats.ttest_1samp(row["by_clip"]["psnr"], 0).confidence_interval(0.95)
    header, body = numbers(scored_rows(groups))
    cell = dict(zip(header, body[-1][1], strict=True))["PSNR ↑"]
    assert cell.half == f"± {(interval.high - interval.low) / 2:.2f}"
    assert {by for _, by, _ in differences(groups)} == {"clip"}


def test_methods_are_paired_by_the_seeds_that_both_have(demos):
    groups = grouped(read_runs(demos))
    found = {label: dict(row) for label, _, row in differences(groups)}
    (label,) = (label for label in found if "minus that of" in label)
    psnr = [json.loads((demos[k] / "report.json").read_text())["rows"]["student"]["psnr"] for k in (2, 0)]
    assert found[label]["PSNR ↑"].text == f"{psnr[0] - psnr[1]:+.2f}" and psnr[0] > psnr[1]
    untrained = [row for row in scored_rows(groups) if row.group is None]
    assert [len(row.scores) for row in untrained] == [2, 2, 2]  # once a seed, though seed 0 was run twice


def test_quality_stands_over_evaluations(demos):
    points = quality(scored_rows(grouped(read_runs(demos))))
    assert list(points) == ["psnr"]  # the only metric that has a value in each
    assert {(point.label, point.nfe) for point in points["psnr"] if point.group is None} == {
        ("Teacher", 12.0),
        ("Teacher, few steps", 4.0),
    }
    drawn = chart("psnr", points["psnr"])
    assert [text for _, text in drawn.x_ticks] == ["1", "2", "4", "8", "16"]
    by_label = {dot.label.split(":")[0]: dot for dot in drawn.dots}
    assert (
        by_label["Teacher, few steps"].x == pytest.approx(0.5, abs=0.1)
        and by_label["Teacher"].y < by_label["Teacher, few steps"].y
    )
    assert all(0 <= dot.high <= dot.y <= dot.low <= 1 for dot in drawn.dots)


def test_the_same_clips_stand_beside_each_other(stages, demos):
    shown = held_out(grouped(read_runs(demos)))
    assert [clip["name"] for clip in shown] == ["clip-0", "clip-1", "clip-2"]
    assert list(shown[0]["sheets"]) == ["render", "teacher", "run0", "run1", "run2", "truth"]
    assert shown[0]["captions"]["run1"][0].endswith("seed 1") and shown[0]["known"] == [0, 3]
    one, other = samples(grouped(read_runs(stages)))  # two noises of the training clip
    assert list(one["sheets"]) == list(other["sheets"]) == ["run0", "run1", "run2", "truth"]
    assert one["sheets"]["truth"] == other["sheets"]["truth"] and one["sheets"]["run0"] != other["sheets"]["run0"]
    assert one["captions"]["run0"][1] == "after iteration 6"


def test_the_page_is_whole_and_loads_nothing(stages, demos, tmp_path):
    for name, given in (("stages", stages), ("one", stages[:1]), ("demos", demos), ("mixed", [stages[0], demos[1]])):
        page = report(given, tmp_path / f"{name}.html").read_text()
        assert not re.search(r"https?:|@import|url\(|//cdn", page)
        for tag, attributes in Page(page).tags:
            assert tag not in ("link", "iframe", "object", "embed")
            assert (attributes.get("src") or "data:").startswith("data:") and "href" not in attributes
        text = re.sub(r"\s+", " ", "".join(Page(page).text))
        assert (
            "Diagnosis" in text
            and "Pairs the head orders rightly" in text
            and all(str(place) in text for place in given)
        )
    assert "3 runs of 2 methods" in (tmp_path / "demos.html").read_text()
    assert report(demos, tmp_path / "demos.html")  # its own page may be replaced


def test_runs_that_cannot_stand_together_are_refused(stages, demos, tmp_path):
    out = tmp_path / "page.html"
    assert "given twice" in refusal(lambda: report([stages[0], stages[0]], out))
    shutil.copytree(stages[0], tmp_path / "copy")
    assert "have the same settings and seed 0" in refusal(lambda: report([stages[0], tmp_path / "copy"], out))
    other = shutil.copytree(demos[1], tmp_path / "scenes")
    words = json.loads((other / "report.json").read_text())
    (other / "report.json").write_text(json.dumps(words | {"scenes": ["another"]}))
    assert "were scored on other scenes" in refusal(lambda: report([demos[0], other], out))
    words["rows"]["student"]["lpips_net"] = "vgg"
    (other / "report.json").write_text(json.dumps(words))
    assert "were scored by another LPIPS network" in refusal(lambda: report([demos[0], other], out))
    (tmp_path / "empty").mkdir()
    assert "holds no run" in refusal(lambda: report([tmp_path / "empty"], out))
    assert "lie in one another" in refusal(lambda: report(stages[:1], stages[0] / "page.html"))
    out.write_text("mine")
    assert "did not write it" in refusal(lambda: report(stages[:1], out)) and out.read_text() == "mine"


@pytest.mark.parametrize("damage", ["cut", "list", "rows", "numbers", "clips", "script", "nothing"])
def test_a_damaged_report_is_left_out_and_named(demos, tmp_path, damage):
    folder = shutil.copytree(demos[0], tmp_path / "demo")
    file, clips = folder / "report.json", folder / "clips.json"
    words, shown = json.loads(file.read_text()), json.loads(clips.read_text())
    if damage == "script":
        shown[0]["sheets"]["student"] = 'data:image/webp;base64,AA"><script>alert(1)</script>'
    texts = {
        "cut": file.read_text()[:99],
        "list": "[1]",
        "rows": json.dumps(words | {"rows": {"student": 3}}),
        "numbers": json.dumps(words | {"rows": {"student": {"psnr": "high"}}}),
    }
    file.write_text(texts.get(damage, json.dumps(words)))
    clips.write_text({"clips": "{}", "script": json.dumps(shown)}.get(damage, clips.read_text()))
    page = report([folder], tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    named = {"nothing": "", "clips": "clips.json is left out", "script": "clips.json is left out"}
    assert named.get(damage, "report.json is left out") in page and ("is left out (" in page) == (damage != "nothing")


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_pictures_play_and_stop_at_a_numbered_frame(demos, tmp_path):
    page = report(demos[:1], tmp_path / "page.html")
    with browser() as window:
        window.open(page)
        # Two moments may show one frame, on the way there and on the way back; so the change itself is waited for. The
        # browser gives up after 30 s.
        before, after = window.later(
            "const done = arguments[0], place = document.getElementById('place'), before = place.textContent;"
            " new MutationObserver(() => { if (place.textContent !== before) done([before, place.textContent]); })"
            "  .observe(place, {childList: true, characterData: true, subtree: true});"
        )
        assert before != after and all(re.fullmatch(r"[1-4] of 4", text) for text in (before, after))
        window.click("#play")
        states = []
        for frame in range(4):
            window.run(
                "const s = document.getElementById('frame'); s.value = arguments[0];"
                " s.dispatchEvent(new Event('input'));",
                frame,
            )
            states.append(
                window.run(
                    "return [document.getElementById('place').textContent,"
                    " getComputedStyle(document.querySelector('.given')).visibility,"
                    " document.querySelector('canvas').toDataURL()]"
                )
            )
        assert [place for place, _, _ in states] == [f"{k} of 4" for k in range(1, 5)]
        assert [given for _, given, _ in states] == ["visible", "hidden", "hidden", "visible"]
        assert len({picture for _, _, picture in states}) == 4
        for width in (1280, 390):  # nothing is wider than the window
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            window.ask("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})
            assert window.run("return document.documentElement.scrollWidth <= window.innerWidth")
        assert not window.complaints()
