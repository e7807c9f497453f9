"""Camera errors and consistency: closed forms of the formulas, and SfM over pictures whose cameras are known."""

from __future__ import annotations

import csv
import json
import math
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from checks import refusal
from test_camera_error import path, turned
from torch import Tensor
from typer.testing import CliRunner

from fvgen.cli import app
from fvgen.geometry.cameras import Cameras, look_at, pinhole, pixel_rays, project
from fvgen.metrics.consistency import match_distance, reprojection_distance, track_lengths
from fvgen.reports.compare import compare
from fvgen.walks.dataset import View, save_png, write_views

HEIGHT, WIDTH, VIEWS = 240, 320, 7
REPOSITORY = Path(__file__).resolve().parents[1]


def aside(move: tuple[float, float, float], zoom: float = 1.0) -> Cameras:
    """Two views of one direction, the second one moved and with another focal length."""
    poses = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
    poses[1, :3, 3] = torch.tensor(move)
    lens = pinhole(2, 100, 100, 90).double()
    lens[1, [0, 1], [0, 1]] *= zoom
    return Cameras(poses, lens, 100, 100)


# --- Formulas ---


def test_exact_matches_are_no_distance_off():
    cameras = Cameras(path(4), pinhole(4, 100, 150, 70).double(), 100, 150)
    points = torch.randn(50, 3, dtype=torch.float64) * 3
    pixels, depth = project(points, cameras)
    for first, second in ((0, 1), (3, 2)):
        seen = (depth[first].abs() > 0.3) & (depth[second].abs() > 0.3)
        found = match_distance(pixels[first, seen], pixels[second, seen], cameras, first, second)
        assert seen.sum() > 20 and found.max() < 1e-7


def test_a_known_offset_is_a_known_distance():
    """Side by side, epipolar lines are rows: an offset of d rows is shared by both views, d / sqrt(2), and one of
    columns is depth. With twice the focal length in the second view a row in the first is two there: d / sqrt(5)."""
    points = torch.randn(20, 3, dtype=torch.float64) + torch.tensor([0.0, 0, 6])
    for move, zoom, offset, expected in (
        ((0.5, 0.0, 0.0), 1.0, (0.0, 3.0), 3 / math.sqrt(2)),
        ((0.5, 0.0, 0.0), 1.0, (3.0, 0.0), 0.0),
        ((0.5, 0.0, 0.0), 2.0, (0.0, 3.0), 3 / math.sqrt(5)),
        ((0.0, 0.0, 0.0), 1.0, (3.0, 4.0), 5 / math.sqrt(2)),  # from one place every offset counts
        ((0.0, 0.0, 0.0), 2.0, (3.0, 4.0), 5 / math.sqrt(5)),
    ):
        cameras = aside(move, zoom)
        pixels, _ = project(points, cameras)
        found = match_distance(pixels[0], pixels[1] + torch.tensor(offset), cameras, 0, 1)
        torch.testing.assert_close(found, torch.full_like(found, expected), atol=1e-9, rtol=0)


def test_a_turn_on_the_spot_is_known_too():
    cameras = Cameras(path(2), pinhole(2, 100, 150, 70).double(), 100, 150)
    cameras.world_from_cam[:, :3, 3] = 2.0
    cameras.world_from_cam[1, :3, :3] = cameras.world_from_cam[0, :3, :3] @ turned(torch.tensor([0.0, 1, 0]), 0.3)
    rays = pixel_rays(cameras)[0].reshape(-1, 3)[::700]
    pixels, _ = project(cameras.centers[0] + 5 * rays, cameras)
    assert match_distance(pixels[0], pixels[1], cameras, 0, 1).max() < 1e-9


def test_reprojection_and_tracks():
    cameras = aside((0.5, 0.0, 0.0))
    points = torch.randn(4, 3, dtype=torch.float64) + torch.tensor([0.0, 0, 6])
    pixels, _ = project(points, cameras)
    point, view = torch.tensor([0, 1, 2, 3, 0, 2]), torch.tensor([0, 0, 0, 0, 1, 1])
    seen = pixels[view, point] + torch.tensor([[0.0, 0], [3, 4], [0, 0], [0, 0], [0, 2], [0, 0]])
    found = reprojection_distance(points[point], cameras, seen, view)
    torch.testing.assert_close(found, torch.tensor([0, 5, 0, 0, 2, 0]).double(), atol=1e-9, rtol=0)
    assert track_lengths(point, view == 0).tolist() == [2, 1, 2, 1]
    assert track_lengths(point, view == 1).tolist() == [2, 2]
    assert track_lengths(point[:0], view[:0] == 1).tolist() == []


# --- Pictures ---


def hall(cameras: Cameras) -> Tensor:
    """[V, 3, H, W]: a box with blotches on its walls, seen from inside."""
    generator = torch.Generator().manual_seed(0)
    walls = torch.rand(6, 3, 40, 40, generator=generator)
    rays, start = pixel_rays(cameras), cameras.centers[:, None, None]
    far = torch.where(rays > 0, 2.0, -2.0)
    away, axis = ((far - start) / torch.where(rays.abs() < 1e-9, 1e-9, rays)).min(-1)
    hit = (start + away[..., None] * rays) / 2
    images = torch.zeros(len(cameras), cameras.height, cameras.width, 3)
    for face in range(6):
        mask = (axis == face % 3) & (hit[..., face % 3].sign() == (1 if face > 2 else -1))
        place = hit[mask][:, [i for i in range(3) if i != face % 3]]
        images[mask] = torch.nn.functional.grid_sample(
            walls[face][None], place[None, None], mode="bicubic", padding_mode="border", align_corners=False
        )[0, :, 0].T
    return images.permute(0, 3, 1, 2).clamp(0, 1)


def around(count: int = VIEWS) -> Cameras:
    x = torch.linspace(-0.9, 0.9, count)
    position = torch.stack([x, -1.2 + 0.3 * x**2, 0.2 * x], dim=1)
    poses = look_at(position, torch.tensor([[0.2, 2.0, 0.0]]).expand(count, 3), torch.tensor([0.0, 0.0, 1.0]))
    return Cameras(poses, pinhole(count, HEIGHT, WIDTH, 70), HEIGHT, WIDTH)


def walk(folder: Path, pictures: Tensor, cameras: Cameras, given: tuple[int, ...] = (0, VIEWS - 1)) -> Path:
    """As `fvgen generate` writes one."""
    write_views(folder, [View(f"{k:02d}.png", x, k not in given) for k, x in enumerate(pictures)], cameras)
    return folder


def strayed() -> tuple[Cameras, Cameras]:
    """What is asked for, and where view 2 is in truth: turned by 10 degrees and a tenth to the side."""
    asked, true = around(), around()
    true.world_from_cam[2, :3, :3] = (
        asked.world_from_cam[2, :3, :3] @ turned(torch.tensor([0.0, 1, 0]), math.radians(10)).float()
    )
    true.world_from_cam[2, :3, 3] += 0.1 * asked.world_from_cam[2, :3, 0]
    return asked, true


def test_errors_are_those_that_were_put_in_and_failures_count(tmp_path):
    pytest.importorskip("pycolmap")
    asked, true = strayed()
    pictures = hall(true)
    pictures[4] = torch.rand(pictures[4].shape, generator=torch.Generator().manual_seed(1))
    folder = walk(tmp_path / "walk", pictures, asked)
    outcome = CliRunner().invoke(app, ["evaluate", str(folder), "--cameras", "--out", str(tmp_path / "scores.json")])
    assert outcome.exit_code == 0, outcome.output
    assert "1 of 5 generated frames have no camera error: 04" in outcome.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    error, consistency = scores["camera_error"], scores["consistency"]
    assert (error["given"], error["given_placed"], error["generated"], error["failures"]) == (2, 2, 5, 1)
    assert error["given_rotation_degrees"] < 0.5
    assert error["failed"] == ["04"] and error["obeyed"] == 3 / 5 and consistency["registered"] == 4 / 5
    rows = {row["name"]: row for row in scores["frames"]}
    # a tenth of the turn that was put in; at 229 pixels of focal length half a degree is two pixels
    assert rows["02"]["rotation_degrees"] == pytest.approx(10, abs=1) and rows["02"]["sampson"] > 3
    assert rows["02"]["position"] == pytest.approx(0.1, abs=0.03)
    for name in ("01", "03", "05"):
        assert rows[name]["rotation_degrees"] < 0.5 and rows[name]["position"] < 0.03 and rows[name]["sampson"] < 1
        assert rows[name]["agreeing"] > 50
    assert rows["04"] == {
        "name": "04", "rotation_degrees": None, "position": None, "sampson": None, "agreeing": 0,
    }  # fmt: skip
    assert set(rows["00"].values()) == {"00", None}  # it was given
    assert consistency["unmatched"] == 1 and consistency["reprojection"] < 1 and consistency["track_length"] > 2
    table = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert float(table[2]["rotation_degrees"]) == pytest.approx(rows["02"]["rotation_degrees"])
    assert table[4]["rotation_degrees"] == "" and scores["truth"] is None and scores["why_null"] == {}


def test_predicted_pictures_against_a_posed_truth(tmp_path):
    """No view is said to be generated: all true pictures are given, all predicted ones are judged; and the other
    metrics are there as ever."""
    pytest.importorskip("pycolmap")
    asked, true = strayed()
    cameras = asked[[0, 1, 2, 3]]
    truth = walk(tmp_path / "truth", hall(cameras), cameras, (0, 1, 2, 3))
    (tmp_path / "predicted").mkdir()
    for k, picture in enumerate(hall(true[[0, 1, 2, 3]])):
        save_png(tmp_path / "predicted" / f"{k:02d}.png", picture)
    found = compare(tmp_path / "predicted", truth, cameras=True)
    assert (found["camera_error"]["given"], found["camera_error"]["generated"]) == (4, 4)
    assert found["camera_error"]["failures"] == 0 and found["camera_error"]["obeyed"] == 3 / 4
    assert found["frames"][2]["rotation_degrees"] == pytest.approx(10, abs=1)
    assert found["frames"][0]["psnr"] > 99 > 40 > found["frames"][2]["psnr"]


def test_a_single_given_view_tells_no_scale_and_all_else_is_told(tmp_path):
    pytest.importorskip("pycolmap")
    cameras = around()[[0, 1, 2]]
    found = compare(walk(tmp_path / "walk", hall(cameras), cameras, (0,)), cameras=True)
    assert found["camera_error"]["failures"] == 2 and found["camera_error"]["position"] is None
    assert "two are needed" in found["why_null"]["camera_error"]
    assert found["consistency"]["registered"] == 1 and found["consistency"]["sampson"] < 1


def test_what_cannot_be_judged_is_one_sentence(tmp_path, monkeypatch):
    cameras = around()
    whole = walk(tmp_path / "walk", torch.rand(VIEWS, 3, HEIGHT, WIDTH), cameras)
    few = walk(tmp_path / "few", torch.rand(2, 3, HEIGHT, WIDTH), cameras[[0, 1]], (0,))
    given = walk(tmp_path / "given", torch.rand(2, 3, HEIGHT, WIDTH), cameras[[0, 1]], (0, 1))
    plain = tmp_path / "plain"
    plain.mkdir()
    save_png(plain / "00.png", torch.rand(3, HEIGHT, WIDTH))
    for place, truth, asked, told in (
        (few, None, True, "has 2 pictures, given and generated, and --cameras needs 3"),
        (given, None, True, "does not say them"),
        (plain, plain, True, "does not say them"),
        (whole, None, False, "nothing to compare"),
    ):
        said = refusal(lambda p=place, t=truth, c=asked: compare(p, t, tmp_path / "scores.json", c))
        assert told in said
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    assert "[photos]" in refusal(lambda: compare(whole, None, tmp_path / "scores.json", True))
    assert not (tmp_path / "scores.json").exists()


# --- Do they rank? ---


@pytest.mark.slow
def test_a_true_clip_a_blurred_one_wrong_cameras_and_noise_rank_in_this_order(monkeypatch):
    """Three rooms: matches that agree with the commanded cameras rank all; what the page says of the others."""
    pytest.importorskip("pycolmap")
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    benchmark = import_module("consistency")
    rows = [row for room in range(3) for row in benchmark.measure(room)]
    table = {row["statistic"]: row for row in benchmark.ranking(rows)}
    assert table["agreeing"]["all in order"] == "3 of 3"
    assert table["sampson"]["blurred < wrong"] == table["sampson"]["wrong < noise"] == "3 of 3"
    for row in rows:
        if row["clip"] == "noise":
            assert row["registered"] == row["agreeing"] == row["obeyed"] == 0 and row["sampson"] is None
        if row["clip"] == "true":
            assert row["registered"] == 1 and row["rotation_degrees"] < 1 and row["position_of_extent"] < 0.05
