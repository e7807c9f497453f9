"""`fvgen evaluate`: the same numbers as all pictures at once, however they lie and however many there are."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from checks import refusal
from PIL import Image
from typer.testing import CliRunner

from fvgen.cli import app
from fvgen.metrics import score_images
from fvgen.reports import compare as compare_module
from fvgen.reports.compare import compare, open_frames
from fvgen.walks.dataset import save_png
from fvgen.walks.film import write_film


def pictures(folder: Path, images: torch.Tensor, name: str = "{}") -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        save_png(folder / f"{name.format(number)}.png", image)
    return folder


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path, torch.Tensor, torch.Tensor]:
    one, other = (torch.rand(2, 5, 3, 40, 48, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    return pictures(tmp_path / "one", one), pictures(tmp_path / "other", other), one, other


def test_batches_give_what_all_at_once_give(pair, monkeypatch):
    one, other, a, b = pair
    expected = score_images(a, b)
    for batch in (64, 2):
        monkeypatch.setattr(compare_module, "BATCH", batch)
        found = compare(one, other)
        assert found["n"] == 5 and found["lpips_net"] == expected["lpips_net"]
        for name in ("psnr", "ssim", "lpips", "kid_squeeze", "fid"):
            assert found[name] == (None if expected[name] is None else pytest.approx(expected[name], rel=1e-4)), name
        assert set(found["why_null"]) == set(expected["why_null"])


def test_the_command_writes_rows_of_every_frame(pair, tmp_path):
    one, other, a, b = pair
    outcome = CliRunner().invoke(app, ["evaluate", str(one), str(other), "--out", str(tmp_path / "scores.json")])
    assert outcome.exit_code == 0, outcome.output
    scores = json.loads((tmp_path / "scores.json").read_text())
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == ["0", "1", "2", "3", "4"] == [row["name"] for row in scores["frames"]]
    assert float(rows[3]["psnr"]) == pytest.approx(score_images(a[3:4], b[3:4])["psnr"], rel=1e-5)
    again = CliRunner().invoke(app, ["evaluate", str(one), str(other), "--out", str(tmp_path / "scores.json")])
    assert again.exit_code == 0  # its own may be replaced
    (tmp_path / "mine.json").write_text("{}")
    (tmp_path / "table.csv").write_text("1,2")
    for name, told in (("mine.json", "did not write"), ("table.json", "would replace"), ("x.txt", "end in .json")):
        assert told in refusal(lambda name=name: compare(one, other, tmp_path / name))
    assert scores["psnr"] == pytest.approx(sum(float(row["psnr"]) for row in rows) / 5)


def test_other_names_match_by_order_and_a_set_is_itself(pair, tmp_path):
    one, _, a, _ = pair
    renamed = pictures(tmp_path / "renamed", a, "frame_{}")
    found = compare(renamed, one)
    assert found["psnr"] == 100 and found["ssim"] == pytest.approx(1)
    assert found["frames"][0]["name"] == "frame_0"


def test_videos_are_read(tmp_path, pair):
    pytest.importorskip("av")
    _, _, a, _ = pair
    smooth = torch.nn.functional.interpolate(a[:, :, :4, :4], (40, 48), mode="bilinear")
    write_film(tmp_path / "film.mp4", smooth, 10)
    frames = open_frames(tmp_path / "film.mp4")
    assert len(frames.names) == 5 and next(frames.read()).shape == (3, 40, 48)
    assert compare(tmp_path / "film.mp4", pictures(tmp_path / "smooth", smooth))["psnr"] > 25  # the codec's loss


def test_what_does_not_match_is_one_sentence(pair, tmp_path):
    one, _, a, _ = pair
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (48, 41)).save(pictures(tmp_path / "larger", a) / "4.png")
    for predicted, truth, told in (
        (one, pictures(tmp_path / "four", a[:4]), "5 pictures"),
        (one, tmp_path / "none", "not exist"),
        (one, tmp_path / "empty", "holds no pictures"),
        (one, tmp_path / "larger", "4 is 40x48"),
        (one / "0.png", one, "neither a folder nor a video"),
    ):
        assert told in refusal(lambda predicted=predicted, truth=truth: compare(predicted, truth, tmp_path / "x.json"))
    mixed = pictures(tmp_path / "mixed", a[:4])
    save_png(mixed / "other.png", a[4])
    assert "4 is in one of them" in refusal(lambda: compare(one, mixed))
    assert not (tmp_path / "x.json").exists()
