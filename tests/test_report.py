"""The report's two files: what a program reads back, and that the page is whole, safe and self-contained."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from fvgen.diagnosis.diagnose import diagnosis_of
from fvgen.diagnosis.series import Series
from fvgen.metrics import score_images
from fvgen.reports.curves import MOST_POINTS, curves, loss_curves
from fvgen.reports.page import LABELS, TABLE, ReportClip, gains, pictures, table, write_report

FRAMES, HEIGHT, WIDTH = 5, 24, 40
NASTY = "attic <script>alert(1)</script> \"&' {{ 7 * 7 }}"


class Page(HTMLParser):
    """Tags, their attributes, and the visible text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def having(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def clip(name, seed=0, columns=tuple(LABELS), size=(FRAMES, 3, HEIGHT, WIDTH)):
    generator = torch.Generator().manual_seed(seed)
    return ReportClip(name, {key: torch.rand(size, generator=generator) for key in columns}, known=(0, size[0] - 1))


@pytest.fixture
def clips():
    return [clip(NASTY), clip("cellar", 1)]


@pytest.fixture
def report(clips, monkeypatch, tmp_path):
    monkeypatch.delenv("FVGEN_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    truth = torch.cat([c.videos["truth"] for c in clips])
    steps = {
        "render": (0, 0),
        "teacher": (50, 100),
        "teacher_few": (4, 8),
        "gan_init": (4, 4),
        "student": (4, 4),
    }
    rows = {
        key: {"steps": s, "nfe": nfe, "seconds_per_clip": 0.05 * nfe + 0.01}
        | score_images(torch.cat([c.videos[key] for c in clips]), truth, clip_of=torch.arange(2 * FRAMES) // FRAMES)
        for key, (s, nfe) in steps.items()
    }
    return {
        "data": "made-up clips",
        "clips": 16,
        "scenes": [c.name for c in clips],
        "frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "seed": 0,
        "device": "cpu",
        "rows": rows,
        "speedup": 5.01 / 0.21,
        "stages": [{"name": "stage1", "iterations": 60, "seconds": 1.5}],
    }


CURVES = {"stage1": [{"iteration": i, "loss_generator": 1 / (i + 1), "seconds": 0.1} for i in range(60)]}


@pytest.fixture
def page(report, clips, tmp_path):
    write_report(tmp_path / "run", report, clips, CURVES)
    return (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_json_round_trip(report, clips, tmp_path):
    write_report(tmp_path, report, clips, CURVES)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips.json", "report.html", "report.json"]


def test_what_is_not_finite_becomes_null(report, clips, tmp_path):
    report["speedup"] = float("inf")
    report["rows"]["student"]["psnr"] = float("nan")
    write_report(tmp_path, report, clips, CURVES)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert read["speedup"] is None and read["rows"]["student"]["psnr"] is None


def test_every_field_is_documented(report):
    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text()
    fields = {
        *report,
        *report["rows"],
        *(key for row in report["rows"].values() for key in row),
        *report["stages"][0],
    }
    assert not [field for field in fields if f"`{field}`" not in text]


def test_page_loads_nothing(page):
    assert not re.search(r"https?:|@import|url\(|//cdn", page)
    for tag, attributes in Page(page).tags:
        assert tag not in ("link", "iframe", "object", "embed")
        assert (attributes.get("src") or "data:").startswith("data:") and "href" not in attributes


def test_the_diagnosis_stands_on_the_page(report, clips, tmp_path):
    rows = [{"iteration": i, "loss_student": 1.0, "loss_head": 0.7} for i in (1, 2, 5)]
    ill = diagnosis_of(Series(NASTY, {"method": "gan", "iterations": 9}, rows))
    well = diagnosis_of(Series("stage2", {"method": "dmd"}, rows[:2], finished=True))
    write_report(tmp_path, report, clips, CURVES, [ill, well])
    text = re.sub(r"\s+", " ", "".join(Page((tmp_path / "report.html").read_text()).text))
    assert "Resume gap" in text and "2 of 5 iterations are missing in metrics.jsonl: 3 to 4" in text
    assert "gan, 5 of 9 iterations, not finished" in text and re.search(r"Healthy: \d+ patterns", text)
    assert "Cannot be told: one colour (without samples)" in text and NASTY in text


def test_names_are_escaped(page):
    assert "<script>alert" not in page
    assert NASTY in "".join(Page(page).text)
    assert any(NASTY in attributes.get("aria-label", "") for attributes in Page(page).having("canvas"))
    assert len(Page(page).having("script")) == 1


def test_every_picture_has_a_text(page):
    parsed = Page(page)
    assert len(parsed.having("canvas")) == len(parsed.having("img")) == 2 * len(LABELS)
    assert all(attributes["alt"] for attributes in parsed.having("img"))
    assert all(attributes["aria-label"] for tag in ("canvas", "svg") for attributes in parsed.having(tag))


def test_headline_and_table_say_the_numbers(page, report):
    text = re.sub(r"\s+", " ", "".join(Page(page).text))
    assert "makes a clip 23.9× faster than its teacher" in text
    assert "4 network evaluations instead of 100" in text
    assert f"reaches {report['rows']['student']['psnr']:.2f} dB PSNR" in text


def test_columns_without_a_value_are_a_note_and_single_gaps_a_footnote(report, page):
    header, rows, notes = table(report["rows"])
    assert [name for name, _ in rows] == list(LABELS)[:5]
    cells = dict(zip(header, dict(rows)["student"], strict=True))
    assert cells["PSNR ↑"].text == f"{report['rows']['student']['psnr']:.2f}" and cells["PSNR ↑"].note is None
    assert not any(word in text for text in header for word in ("KID", "FID", "LPIPS", "MMD"))
    why = report["rows"]["student"]["why_null"]
    assert f"FID, KID are left out: {why['fid']}" in notes and f"LPIPS is left out: {why['lpips']}" in notes
    assert all(note[1:] in "".join(Page(page).text) for note in notes)
    report["rows"]["teacher"]["fid"] = 3.0  # one row has it: the others say why not
    header, rows, notes = table(report["rows"])
    cells = dict(zip(header, dict(rows)["student"], strict=True))
    assert (cells["FID ↓"].text, notes[cells["FID ↓"].note - 1]) == ("–", why["fid"])


def test_intervals_are_over_clips_and_gains_paired_by_them(report, page):
    values = report["rows"]["student"]["by_clip"]["psnr"]
    half = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    _, rows, _ = table(report["rows"])
    assert dict(rows)["student"][3].half == f"± {(half.high - half.low) / 2:.2f}"
    others = report["rows"]["teacher_few"]["by_clip"]["psnr"]
    found = {(one, other): dict(cells) for one, other, cells in gains(report["rows"])}
    difference = sum(a - b for a, b in zip(values, others, strict=True)) / 2
    assert found["student", "teacher_few"]["PSNR ↑"].text == f"{difference:+.2f}"
    assert "95 % interval of the mean over clips" in page and "Student minus teacher, few steps" in page


def test_the_page_says_what_it_shows_and_what_was_given(page):
    text = re.sub(r"\s+", " ", "".join(Page(page).text))
    assert "2 of the 16 clips that were scored, evenly chosen" in text and "1 of 5" in text
    assert page.count('data-known="0 4"') == 2 and "given frame" in text
    assert "loss generator" in text and "loss_generator" in text  # its name in the log stands below every title


def test_table_shows_the_backbone_and_other_distances_when_there_are_values(report):
    for row in report["rows"].values():
        row.update(lpips=0.1, lpips_net="squeeze", kid_squeeze=0.25, why_null={})
    header, rows, notes = table(report["rows"])
    assert "LPIPS (squeeze) ↓" in header and header[-1] == TABLE["kid_squeeze"][0]
    assert dict(rows)["student"][-1].text == "0.2500" and "FID ↓" not in header and not notes


def test_sheets_hold_the_frames_losslessly():
    source = clip("attic")
    out = pictures([source])[0]
    assert (out["frames"], out["columns"]) == (FRAMES, 3) and list(out["sheets"]) == list(LABELS)
    data = base64.b64decode(out["sheets"]["student"].removeprefix("data:image/webp;base64,"))
    sheet = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert sheet.shape == (2 * HEIGHT, 3 * WIDTH, 3)
    expected = (source.videos["student"] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for i in range(FRAMES):
        top, left = i // 3 * HEIGHT, i % 3 * WIDTH
        np.testing.assert_array_equal(sheet[top : top + HEIGHT, left : left + WIDTH], expected[i])


def test_clips_too_large_for_lossless_stay_below_three_megabytes():
    """Noise, which no codec likes: 3.5 MB of pixels."""
    out = pictures([clip("large", columns=("render", "student", "truth"), size=(16, 3, 128, 192))])
    assert sum(len(address) for address in out[0]["sheets"].values()) < 2.8e6


def test_pictures_are_shrunk_at_last(monkeypatch):
    monkeypatch.setattr("fvgen.reports.page.PICTURE_BYTES", 1200)
    out = pictures([clip("attic", columns=("student",))])[0]
    data = base64.b64decode(out["sheets"]["student"].removeprefix("data:image/webp;base64,"))
    assert Image.open(io.BytesIO(data)).size in ((3 * WIDTH // 2, 2 * HEIGHT // 2), (3 * WIDTH // 4, 2 * HEIGHT // 4))
    assert len(data) <= 1200 and (out["width"], out["height"]) == (WIDTH, HEIGHT)


def test_clips_without_extras_or_stages_make_a_page(report, tmp_path):
    for key in ("teacher_few", "gan_init", "render"):
        del report["rows"][key]
    write_report(tmp_path, report, [clip("attic", columns=("teacher", "student", "truth"))], {})
    parsed = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert len(parsed.having("canvas")) == 3 and not parsed.having("svg")
    assert not [attributes for attributes in parsed.having("input") if attributes.get("id") == "all"]


def points(text):
    return np.array([[float(v) for v in pair.split(",")] for pair in text.split()])


def test_a_falling_loss_falls_on_the_page():
    curve = loss_curves([{"iteration": i, "loss": 3 - 0.01 * i} for i in range(200)])[0]
    line, band = points(curve.line), points(curve.band)
    assert len(line) <= MOST_POINTS and (np.diff(line[:, 0]) > 0).all() and (np.diff(line[:, 1]) > 0).all()
    assert band.min() >= 0 and band.max() <= 1
    ticks = {text: position for position, text in curve.y_ticks}
    value_to_y = np.polyfit([float(text) for text in ticks], list(ticks.values()), 1)
    np.testing.assert_allclose(np.polyval(value_to_y, 3 - 0.01 * line[:, 0] * 199), line[:, 1], atol=1e-3)


def test_every_run_of_more_than_five_has_means_and_bands_from_end_to_end():
    """Of 60 iterations as of 6: noise of one size has a band of one size everywhere, and a calm line inside."""
    for count in (6, 60, 500):
        noise = np.random.default_rng(count).normal(size=count)
        curve = loss_curves([{"iteration": i, "loss": float(y)} for i, y in enumerate(noise)])[0]
        line, band = points(curve.line), points(curve.band)
        high, low = band[: len(line), 1], band[: len(line) - 1 : -1, 1]
        assert (low > high).all() and (low >= line[:, 1]).all() and (line[:, 1] >= high).all()
    quarters = [part.mean() for part in np.array_split(low - high, 4)]
    assert max(quarters) < 1.5 * min(quarters)


def test_several_seeds_are_a_mean_between_the_lowest_and_the_highest():
    def rows(offset, count=40):
        return [{"iteration": i, "loss": 100 + i + offset} for i in range(count)]

    (curve,) = curves({"a": [rows(0.0), rows(1.0), rows(5.0)], "b": [rows(30.0, 20)]}, ["loss"])
    assert [line.label for line in curve.lines] == ["a", "b"] and [line.color for line in curve.lines] == [0, 1]
    ticks = {text: position for position, text in curve.y_ticks}
    value = np.poly1d(np.polyfit(list(ticks.values()), [float(text) for text in ticks], 1))
    line, band = points(curve.lines[0].line), points(curve.lines[0].band)
    count = len(line)
    np.testing.assert_allclose(value(band[:count, 1]) - value(line[:, 1]), 3, atol=0.02)
    np.testing.assert_allclose(value(line[:, 1]) - value(band[: count - 1 : -1, 1]), 2, atol=0.02)


def test_a_loss_over_decades_gets_powers_of_ten():
    curve = loss_curves([{"iteration": i, "loss_fake": 10 ** (-i / 50)} for i in range(150)])[0]
    assert [text for _, text in curve.y_ticks] == ["0.001", "0.01", "0.1", "1"]
    np.testing.assert_allclose([position for position, _ in curve.y_ticks], [1, 2 / 3, 1 / 3, 0], atol=1e-6)
    assert curve.title == "loss fake" and loss_curves([{"loss_head": 1.0}] * 2)[0].title == "Head"


def test_only_finite_losses_are_drawn():
    rows = [{"iteration": i, "loss_a": float(i), "other": 1.0} for i in range(10)]
    rows[3]["loss_a"], rows[4]["loss_a"], rows[5]["loss_b"] = float("nan"), None, 1.0
    rows += [{"iteration": 10, "loss_flat": 0.5}, {"iteration": 11, "loss_flat": 0.5}]
    curves = {curve.name: curve for curve in loss_curves(rows)}
    assert list(curves) == ["loss_a", "loss_flat"]  # one value of loss_b is no curve
    assert len(points(curves["loss_a"].line)) == 8
    assert np.isfinite(points(curves["loss_flat"].line)).all()
