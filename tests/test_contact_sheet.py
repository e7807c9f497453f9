"""The page of `fvgen inspect`: what it shows is what is there."""

from __future__ import annotations

import base64
import html
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scene_files import document, write_depth, write_nerfstudio

from fvgen.clips.filters import MEANINGS
from fvgen.errors import UserError
from fvgen.geometry.cameras import look_at
from fvgen.models.viewcrafter.pipelines import ViewCrafterPipeline
from fvgen.pipelines.folders import load_pipeline
from fvgen.reports.contact_sheet import inspect, plan_view
from fvgen.shards.prepare import prepare
from fvgen.shards.reader import ShardSet

KEEP_ALL = {"points": 0.0, "overlap": 0.0, "sharpness": 0.0, "motion": 0.0}


@pytest.fixture
def scene(tmp_path) -> Path:
    folder = tmp_path / "<b>scene & more"
    folder.mkdir()
    write_depth(folder)
    return write_nerfstudio(folder, document(depth=True))


def images(page: str) -> list[np.ndarray]:
    data = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(one)))) for one in data]


class Balanced(HTMLParser):
    """Fails where tags do not match, and on anything that would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert all(not value.startswith(("http", "/", "file")) for key, value in attrs if key in ("src", "href"))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(path: Path) -> str:
    page = path.read_text()
    parser = Balanced()
    parser.feed(page)
    assert not parser.open and "<b>scene" not in page
    return page


def test_shards_show_their_decoded_latents(scene, teacher_folder, tmp_path):
    out = tmp_path / "shards"
    prepare([scene], out, 3, (16, 24), clips_per_scene=4, teacher=str(teacher_folder), workers=1, limits=KEEP_ALL)
    page = checked(inspect(out, tmp_path / "page.html", teacher=str(teacher_folder)))
    shards, pipeline = ShardSet(out), load_pipeline(teacher_folder, ViewCrafterPipeline)
    films = images(page)
    assert len(films) == 2 * len(shards) == 4 and page.count("<svg") == 2
    assert "no further smooth path" in page and "&lt;b&gt;scene" in page
    for index in range(len(shards)):
        clip = shards[index]
        for latents, film in zip(
            (clip.condition["render_latents"], clip.latents), films[2 * index : 2 * index + 2], strict=True
        ):
            frames = pipeline.decode_latents(latents[None])[0].permute(2, 0, 3, 1).reshape(16, 72, 3)
            assert np.abs(film / 255 - frames.numpy()).mean() < 0.06  # lossy, but no other picture


def test_a_scene_shows_its_photographs_and_clips(scene, tmp_path):
    page = checked(inspect(scene, tmp_path / "page.html", clips=1))
    assert len(images(page)) == 3 and page.count("<svg") == 2  # photographs, render, truth
    assert "nerfstudio" in page and "4, each 24 wide and 18 high" in page and "all 4" in page
    assert page.count("<canvas") == 2 and 'id="play"' in page and "(at least 0.02)" in page
    for name, _, text in MEANINGS.values():
        assert page.count(name) >= 2 and text in html.unescape(page)  # beside the figure, and what it means


def test_what_is_not_shown_is_counted(scene, teacher_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fvgen.reports.contact_sheet.PHOTOGRAPHS", 3)
    page = checked(inspect(scene, tmp_path / "page.html", clips=1))
    assert "3 of 4, evenly chosen" in page
    out = tmp_path / "shards"
    prepare([scene], out, 3, (16, 24), clips_per_scene=4, teacher=str(teacher_folder), workers=1, limits=KEEP_ALL)
    page = checked(inspect(out, tmp_path / "page.html", clips=1, teacher=str(teacher_folder)))
    assert "1 of 2, evenly chosen" in page and "3 a clip, each 24 wide and 16 high" in page and len(images(page)) == 2


def test_a_scene_that_gives_no_clip_says_why(tmp_path):
    folder = tmp_path / "random"
    folder.mkdir()
    write_nerfstudio(folder)  # random pictures share nothing, and there are no points to fall back on
    page = checked(inspect(folder, tmp_path / "page.html", clips=1))
    assert "no clip" in page and "stereo" in page and len(images(page)) == 1


@pytest.mark.parametrize("kind", ["none", "file", "empty"])
def test_what_is_neither_is_refused(tmp_path, kind):
    path = tmp_path / kind
    if kind == "file":
        path.touch()
    if kind == "empty":
        path.mkdir()
    with pytest.raises(UserError):
        inspect(path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_picture_from_above_is_a_map():
    """A camera at the origin of a turned world: what it sees ahead is above it, what is to its right, right of it."""
    turn = look_at(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 1.0, 7.0]]), torch.tensor([0.2, -1.0, 0.1]))[0]
    local = torch.tensor([[0.0, 0.0, 2.0], [1.0, 0.0, 2.0], [-1.0, 0.0, 2.0], [0.0, 3.0, 4.0]] * 5)
    points = local @ turn[:3, :3].T + turn[:3, 3]
    plan = plan_view(turn[None], points, torch.tensor([[1.0, 0.5, 0.0]]).expand(20, 3), 0.5)
    x, y = zip(*[(x, y) for x, y, _ in plan.points[:3]], strict=True)
    camera_x, camera_y = map(float, plan.path.split(","))
    assert x[2] < x[0] < x[1] and x[0] == pytest.approx(camera_x, abs=0.1) and y[0] < camera_y
    assert x[1] - x[0] == pytest.approx((camera_y - y[0]) / 2, abs=0.1)  # one scale for both axes
    assert {color for _, _, color in plan.points} == {"#ff8000"} and len(plan.cameras) == 1
    assert all(0 <= value <= 100 for point in plan.points for value in point[:2])
