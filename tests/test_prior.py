"""What a leap starts from: closed renders, of clips and of walks, and renders of other programs."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from checks import refusal
from PIL import Image
from scene_files import document, world, write_depth, write_images, write_nerfstudio
from small_models import FRAMES, HEIGHT, WIDTH, small_teacher
from torch import Tensor

import fvgen
from fvgen.clips.clip import render_clip
from fvgen.geometry.cameras import Cameras, look_at, pinhole
from fvgen.geometry.closing import RADIUS, closed
from fvgen.geometry.focus_point import focus_point
from fvgen.geometry.pointcloud import point_radius
from fvgen.models.viewcrafter.leap import FVGenLeapPipeline
from fvgen.pipelines.folders import save_model
from fvgen.shards.encoders import render_needs
from fvgen.shards.reader import ShardSet
from fvgen.walks.outside import read_render
from fvgen.walks.paths import camera_path


def leap_student() -> FVGenLeapPipeline:
    teacher = small_teacher()
    return FVGenLeapPipeline.from_teacher(teacher, copy.deepcopy(teacher.network), t=459, t_max=599)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "leap"
    save_model(leap_student(), folder)
    return folder


def test_holes_take_the_nearest_colour_and_black_does_not_shine_through():
    images, seen = torch.zeros(2, 3, 5, 7), torch.zeros(2, 5, 7)
    red, blue = torch.tensor([0.8, 0.2, 0.0]), torch.tensor([0.0, 0.2, 0.8])
    for column, color in ((1, red), (6, blue)):
        images[0, :, 2, column], seen[0, 2, column] = 0.5 * color, 0.5  # half of what is seen is the black behind it
    found = closed(images, seen)
    torch.testing.assert_close(found[0, :, 2, 1], red)
    torch.testing.assert_close(found[0, :, 0, 0], red)
    torch.testing.assert_close(found[0, :, 4, 6], blue)
    left, right = found[0, 0, :, :3], found[0, 0, :, 5:]
    assert (left == left[0, 0]).all() and (right == right[0, 0]).all()
    assert not found[1].any()  # nothing to take a colour from
    whole = closed(torch.full((1, 3, 4, 4), 0.7), torch.ones(1, 4, 4))
    torch.testing.assert_close(whole, torch.full((1, 3, 4, 4), 0.7))


def test_a_closed_clip_has_no_hole_and_keeps_its_photographs():
    frames, generator = 4, torch.Generator().manual_seed(0)
    position = torch.stack([torch.linspace(-0.5, 0.5, frames), torch.zeros(frames), torch.full((frames,), -3.0)], -1)
    poses = look_at(position, torch.zeros(frames, 3), torch.tensor([0.0, -1.0, 0.0]))
    cameras = Cameras(poses, pinhole(frames, 16, 24, 60.0), 16, 24)
    truth = torch.rand(frames, 3, 16, 24, generator=generator)
    points, colors = torch.randn(60, 3, generator=generator) * 0.5, 0.2 + 0.8 * torch.rand(60, 3, generator=generator)
    clips = [render_clip("x", truth, cameras, points, colors, [0, 3], 0.1, close=close) for close in (False, True)]
    (opened, seen), (shut, seen_too) = clips
    assert torch.equal(seen, seen_too) and not seen.all()
    assert (opened.render[1:3].amax(1) == 0).any() and (shut.render[1:3].amax(1) > 0.15).all()
    assert torch.equal(shut.render[[0, 3]], truth[[0, 3]])


def test_models_that_leap_want_closed_renders(teacher):
    leaps, plain = (render_needs(model, None, (HEIGHT, WIDTH), None) for model in (leap_student(), teacher))
    assert leaps.closed and not plain.closed
    assert leaps.radius == RADIUS * plain.radius == RADIUS * point_radius(HEIGHT, WIDTH)
    assert render_needs(teacher, None, (HEIGHT, WIDTH), None, True) == leaps
    from small_cogvideox import small_teacher as cogvideox

    assert cogvideox(image_condition="ends").closed_renders and not cogvideox().closed_renders


def test_shards_of_closed_renders(make_shards, shards, tmp_path):
    make_shards(tmp_path / "closed", closed=True, keep_frames=True)
    shut, opened = ShardSet(tmp_path / "closed"), ShardSet(shards)
    assert shut.settings.closed and not opened.settings.closed
    assert "closed" not in opened.settings.model_dump() and shut.settings.digest() != opened.settings.digest()
    assert shut.names == opened.names
    for index in range(len(shut)):
        assert torch.equal(shut[index].latents, opened[index].latents)
        assert not torch.equal(shut[index].condition["render_latents"], opened[index].condition["render_latents"])
    words = refusal(lambda: make_shards(tmp_path / "closed", keep_frames=True))
    assert "holds shards of other settings" in words and "radius" in words


# --- Walks ---


def test_a_leap_walks(student_folder, tmp_path):
    scene = tmp_path / "scene"
    scene.mkdir()
    write_depth(scene)
    write_nerfstudio(scene, document(depth=True))
    out = fvgen.generate(scene, tmp_path / "walk", model=student_folder, size=(HEIGHT, WIDTH), trajectory="focus")
    result = json.loads((out / "run.json").read_text())
    assert result["kind"] == "FVGenLeapPipeline" and len(list((out / "frames").iterdir())) == 3 * (FRAMES - 1) + 1
    assert result["result"]["known"] == {str(3 * view): f"given_{view:03d}.png" for view in range(4)}


def test_photographs_without_poses_that_cannot_be_posed(student_folder, tmp_path):
    """The prior needs poses; these pictures are noise, in which nobody finds any."""
    write_images(tmp_path)
    sentence = refusal(lambda: fvgen.generate(tmp_path / "images", tmp_path / "walk", model=student_folder))
    assert "pose" in sentence and not (tmp_path / "walk").exists()


def test_the_focus_path_meets_every_photograph(scene_cameras):
    for frames, count in ((None, 3 * 8 + 1), (14, 14)):
        walk = camera_path("focus", scene_cameras, [0, 1, 2, 3], frames, 9, 4.0)
        assert len(walk.cameras) == count and sorted(walk.known.values()) == [0, 1, 2, 3]
        assert {walk.known[0], walk.known[count - 1]} == {0, 3}
    one = focus_point(scene_cameras[[0, 1]], 9)
    walk = camera_path("focus", scene_cameras, [0, 1, 2, 3], None, 9, 4.0)
    assert torch.equal(walk.cameras.world_from_cam[:9], one.world_from_cam)
    assert "needs two photographs" in refusal(lambda: camera_path("focus", scene_cameras, [0], None, 9, 4.0))
    assert "cannot have 3 frames" in refusal(lambda: camera_path("focus", scene_cameras, [0, 1, 2, 3], 3, 9, 4.0))


@pytest.fixture
def scene_cameras() -> Cameras:
    return world()[0]


def test_a_focus_path_looks_at_its_point(scene_cameras):
    """All views of the arc look at the origin, and so do those between them; their distance runs straight."""
    path = focus_point(scene_cameras[[0, 3]], 7)
    to_origin = torch.nn.functional.normalize(-path.centers, dim=1)
    torch.testing.assert_close(path.world_from_cam[:, :3, 2], to_origin, rtol=0, atol=1e-6)
    distance = path.centers.norm(dim=1)
    torch.testing.assert_close(
        distance, torch.linspace(distance[0], distance[-1], 7, dtype=torch.float64), atol=1e-6, rtol=0
    )


# --- Renders of other programs ---


def pictures(folder, count: int, size: tuple[int, int] = (16, 24)) -> Tensor:
    folder.mkdir()
    frames = torch.randint(0, 256, (count, *size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for number, frame in enumerate(frames):
        Image.fromarray(frame.numpy()).save(folder / f"{number:03d}.png")
    return frames.permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize(
    ("count", "taken"), [(9, range(9)), (17, range(9)), (18, range(0, 18, 2)), (40, range(0, 36, 4))]
)
def test_a_render_from_disk(tmp_path, count, taken):
    frames = pictures(tmp_path / "render", count)
    found = read_render(tmp_path / "render", 9, 16, 24)
    assert torch.equal(found, frames[list(taken)])
    assert read_render(tmp_path / "render", 9, 32, 32).shape == (9, 3, 32, 32)


def test_renders_that_do_not_fit(tmp_path):
    pictures(tmp_path / "render", 8)
    assert "has 8 frames, the model takes 9" in refusal(lambda: read_render(tmp_path / "render", 9, 16, 24))
    assert "does not exist" in refusal(lambda: read_render(tmp_path / "nothing", 9, 16, 24))
    Image.new("RGB", (5, 5)).save(tmp_path / "render" / "999.png")
    assert "of several sizes" in refusal(lambda: read_render(tmp_path / "render", 9, 16, 24))


def test_it_is_what_a_pipeline_takes(tmp_path):
    pictures(tmp_path / "render", FRAMES)
    student = leap_student()
    student.set_progress_bar_config(disable=True)
    video = student(read_render(tmp_path / "render", FRAMES, HEIGHT, WIDTH)[None])
    assert video.shape == (1, FRAMES, 3, HEIGHT, WIDTH)
