"""Paths that a model cannot follow: one sentence, nothing written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checks import refusal
from scene_files import document, write_depth, write_nerfstudio
from small_cogvideox import HEIGHT, WIDTH, small_teacher

import fvgen
from fvgen.geometry.cameras import Cameras, pinhole
from fvgen.geometry.trajectories import dolly, orbit, pan, write_path
from fvgen.pipelines.folders import save_model
from fvgen.walks.chain import Span, spans
from fvgen.walks.judged import behind_surfaces, judge_guided
from fvgen.walks.render import Cloud, Rendered, judge_start

DEPTH = 2.0
WHOLE = [Span(0, 9)]


def camera() -> Cameras:
    return Cameras(torch.eye(4)[None], pinhole(1, HEIGHT, WIDTH, 60), HEIGHT, WIDTH)


def flat_wall(views: int = 1) -> Cloud:
    """At distance 2 before every view."""
    shape = (views, HEIGHT, WIDTH)
    return Cloud(
        [*range(views)], torch.zeros(views, 3, *shape[1:]), camera()[[0] * views], DEPTH * torch.ones(shape), "", 0
    )


def said(path: Cameras, cloud: Cloud | None = None, clips: list[Span] = WHOLE) -> str:
    return refusal(lambda: judge_guided(path, cloud or flat_wall(), clips))


def test_a_guided_walk_goes_on_from_what_frame_0_shows():
    pictures, depth = torch.zeros(2, 3, HEIGHT, WIDTH), torch.ones(2, HEIGHT, WIDTH)
    two = dolly(camera(), 2, DEPTH)

    def start(known: bool, coverage: float) -> Rendered:
        return Rendered(pictures, torch.tensor([known, False]), torch.tensor([coverage, 0.0]), depth, two)

    assert judge_start(start(True, 1.0)) is None
    assert "frame 0 is no photograph but a render, 40% of it filled" in judge_start(start(False, 0.4))
    assert "frame 0 of the path sees no point" in refusal(lambda: judge_start(start(False, 0.0)))


def test_usual_paths_are_none_of_these():
    for path in (orbit(camera(), 9, 30, DEPTH), pan(camera(), 9, yaw=170), dolly(camera(), 9, 0.9 * DEPTH)):
        judge_guided(path, flat_wall(), WHOLE)
    judge_guided(dolly(camera(), 9, -3 * DEPTH, right=5 * DEPTH), flat_wall(), WHOLE)  # away and aside


def test_a_path_that_does_not_move():
    still = replace(camera(), world_from_cam=torch.eye(4).repeat(17, 1, 1), intrinsics=pinhole(17, HEIGHT, WIDTH, 60))
    assert "no motion in frames 0-8" in said(still)
    assert "no motion in frames 0-8" in said(dolly(camera(), 9, 1e-4 * DEPTH))  # rounding, or other units
    poses = still.world_from_cam.clone()
    poses[:9, 0, 3] = torch.linspace(0, 1, 9)
    poses[9:, 0, 3] = 1.0
    judge_guided(replace(still, world_from_cam=poses), flat_wall(), spans(17, 9)[:1])
    assert "no motion in frames 8-16" in said(replace(still, world_from_cam=poses), clips=spans(17, 9))
    judge_guided(pan(camera(), 9, yaw=1), flat_wall(), WHOLE)  # it turns


def test_a_path_in_other_units():
    assert "lengths are not in the scene's units" in said(dolly(camera(), 9, right=101 * DEPTH))
    judge_guided(dolly(camera(), 9, right=99 * DEPTH), flat_wall(), WHOLE)
    endless = dolly(camera(), 9, right=1.0)
    endless.world_from_cam[4, 0, 3] = torch.nan
    assert "lengths are not in the scene's units" in said(endless)


def test_a_path_through_what_the_photograph_shows():
    through = dolly(camera(), 9, 1.5 * DEPTH)  # frame 8 at 3, frame 6 at 2.25, frame 5 at 1.875
    assert behind_surfaces(through, flat_wall()) == [6, 7, 8]
    assert "frames 6-8 of the path are behind what the photograph shows" in said(through)
    judge_guided(through, flat_wall(2), WHOLE)  # another photograph may show a way
    unknown = replace(flat_wall(), depth=torch.zeros(1, HEIGHT, WIDTH))
    assert behind_surfaces(through, unknown) == []
    assert behind_surfaces(dolly(camera(), 9, 1.5 * DEPTH, right=5 * DEPTH), flat_wall()) == []  # round it


def test_a_path_shorter_than_the_vaes_rule_writes_nothing(tmp_path):
    """Five poses, where the model takes 8k+1 frames."""
    (tmp_path / "scene").mkdir()
    write_depth(tmp_path / "scene")
    scene: Path = write_nerfstudio(tmp_path / "scene", document(depth=True))
    save_model(small_teacher(), tmp_path / "model")
    start = fvgen.open_scene(scene).scene.cameras[[0]]
    write_path(tmp_path / "path.json", orbit(start, 5, 3, 4.0))
    options = {"model": tmp_path / "model", "steps": 1, "trajectory": tmp_path / "path.json"}
    found = refusal(lambda: fvgen.generate(scene, tmp_path / "out", **options))
    assert "clips of 5 frames do not fit this model, whose VAE takes 8k+1; give 9 frames" in found
    assert not (tmp_path / "out").exists()
    walked = refusal(lambda: fvgen.walk(scene, tmp_path / "path.json", tmp_path / "model", steps=1))
    assert "clips of 5 frames do not fit this model" in walked
    assert "do not fit this model" in refusal(
        lambda: fvgen.generate(scene, tmp_path / "out", **options | {"frames": 5})
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_poses_that_are_no_numbers_are_named(tmp_path, value):
    path = orbit(camera(), 5, 3, 4.0)
    path.world_from_cam[2, 0, 3] = value
    write_path(tmp_path / "path.json", path)
    (tmp_path / "scene").mkdir()
    write_depth(tmp_path / "scene")
    scene = write_nerfstudio(tmp_path / "scene", document(depth=True))
    opened = fvgen.open_scene(scene)
    assert "path.json" in refusal(lambda: opened.render(tmp_path / "path.json", size=(HEIGHT, WIDTH)))
