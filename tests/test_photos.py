"""Choice of views, resizing and clouds, on scenes whose answers are known, and on the real ones."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fvgen.clips.filters import LIMITS
from fvgen.clips.from_scene import ClipSettings, SceneClip, scene_clips
from fvgen.clips.views import _paths, choose_views, pose_distance
from fvgen.depth.maps import PointMaps
from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, fit_box, look_at, pinhole, project
from fvgen.geometry.pointcloud import point_radius
from fvgen.posing.sources import Opened, Source
from fvgen.scenes.formats import Scene, read_scene
from fvgen.scenes.images import fit_image

HEIGHT, WIDTH = 60, 90
UP = torch.tensor([0.0, -1.0, 0.0])


def cameras_at(position: Tensor) -> Cameras:
    """Looking along z with a shared, tall field of view."""
    poses = look_at(position, position + torch.tensor([0.0, 0.0, 1.0]), UP)
    return Cameras(poses, pinhole(len(position), HEIGHT, WIDTH, 70), HEIGHT, WIDTH)


def line(x: Tensor | list[float]) -> Cameras:
    x = torch.as_tensor(x, dtype=torch.float32)
    return cameras_at(torch.stack([x, torch.zeros_like(x), torch.zeros_like(x)], dim=-1))


def scene_of(cameras: Cameras, **rest: object) -> Scene:
    return Scene("test", tuple(Path(f"{i}.png") for i in range(len(cameras))), cameras, **rest)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# A point 4 units in front of camera 0: what sets the scale of parallax.
FOUR_AWAY = {"points": torch.tensor([[0.0, 0.0, 4.0]]), "observations": torch.zeros(1, 2, dtype=torch.int64)}


# --- Choice of views ---


def test_pose_distance_is_angle_plus_parallax():
    angle = torch.tensor([0.0, 1e-4, 0.3, 3.0])
    target = torch.stack([angle.sin(), torch.zeros(4), angle.cos()], dim=-1)
    poses = look_at(torch.zeros(4, 3), target, UP)
    poses[2, 0, 3] = 0.8
    distance = pose_distance(Cameras(poses, pinhole(4, 4, 4, 60), 4, 4), depth=4.0)
    expected = torch.tensor([0.0, 1e-4, 0.3 + 0.2, 3.0], dtype=torch.float64)
    torch.testing.assert_close(distance[0], expected, atol=2e-6, rtol=0)
    assert torch.equal(distance, distance.T)


@pytest.mark.parametrize("seed", range(4))
def test_paths_follow_the_motion_whatever_the_file_order(seed):
    shuffled = torch.randperm(20, generator=stream(seed))
    scene = scene_of(line(shuffled * 0.1))
    for views in choose_views(scene, 6, 5, stream(seed)):
        steps = shuffled[views].diff()
        assert (steps > 0).all() or (steps < 0).all()
        assert steps.abs().max() <= 2 * steps.abs().min()


def test_both_directions_are_drawn():
    scene = scene_of(line(torch.arange(30) * 0.1))
    rising = [views[0] < views[-1] for views in choose_views(scene, 4, 40, stream())]
    assert 5 < sum(rising) < 35


def test_no_path_jumps_over_a_gap():
    x = torch.cat([torch.arange(8) * 0.1, 30 + torch.arange(8) * 0.1])
    for views in choose_views(scene_of(line(x), **FOUR_AWAY), 5, 6, stream()):
        assert max(views) < 8 or min(views) >= 8
    with pytest.raises(UserError, match="gives 0 clips of 9 frames without jumps, not 1"):
        choose_views(scene_of(line(x), **FOUR_AWAY), 9, 1, stream())


def test_the_path_between_two_ends_is_the_best_that_never_turns_back():
    position = torch.randn(9, 3, generator=stream(3))
    distance = pose_distance(cameras_at(position), depth=1.0)
    pairs = torch.combinations(torch.arange(9))
    for (start, end), found in zip(pairs.tolist(), _paths(distance, pairs, 4, 9).tolist(), strict=True):
        progress = distance[start] / (distance[start] + distance[end])
        others = sorted(set(range(9)) - {start, end}, key=lambda v: progress[v].item())
        paths = [(start, *middle, end) for middle in itertools.combinations(others, 2)]
        cost = [sum(distance[a, b].item() ** 2 for a, b in itertools.pairwise(path)) for path in paths]
        assert tuple(found) == paths[int(np.argmin(cost))]


def test_choice_depends_on_the_seed_alone():
    scene = scene_of(cameras_at(torch.randn(15, 3, generator=stream(1))))
    first = choose_views(scene, 5, 4, stream(7))
    assert first == choose_views(scene, 5, 4, stream(7))
    assert any(first != choose_views(scene, 5, 4, stream(seed)) for seed in range(3))
    assert len({tuple(sorted((views[0], views[-1]))) for views in first}) == 4
    assert all(len(set(views)) == 5 for views in first)


def test_many_views_take_a_sample_of_pairs():
    scene = scene_of(cameras_at(torch.rand(400, 3, generator=stream(1)) * torch.tensor([40.0, 1, 1])))
    views = choose_views(scene, 16, 2, stream())
    assert all(len(set(path)) == 16 for path in views)


def test_too_few_views():
    with pytest.raises(UserError, match="test has 5 views but a clip needs 8 frames; ask for fewer"):
        choose_views(scene_of(line(torch.arange(5.0))), 8, 1, stream())
    with pytest.raises(UserError, match="gives 10 clips of 3 frames without jumps, not 11; ask for fewer"):
        choose_views(scene_of(line(torch.arange(5.0)), **FOUR_AWAY), 3, 11, stream())
    with pytest.raises(UserError, match="gives 0 clips"):
        choose_views(scene_of(line(torch.zeros(5))), 3, 1, stream())


# --- Images ---


@pytest.mark.parametrize("size", [(30, 45), (40, 24), (17, 50), (120, 180), (48, 64)])
def test_resized_image_and_camera_stay_in_step(size):
    cameras = line([0.0])
    points = torch.tensor([[0.2, -0.1, 2.0], [-0.3, 0.25, 2.0], [0.0, 0.0, 2.0]])
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    fitted = cameras.fitted(*size)
    for point in points:
        u, v = project(point[None], cameras)[0][0, 0].tolist()
        blob = np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * 3.0**2))
        image = fit_image((np.repeat(blob[..., None], 3, axis=-1) * 255).round().astype(np.uint8), *size)
        assert image.shape == (3, *size) and image.dtype == torch.float32
        weight = image[0] * (image[0] > 0.02)
        rows, columns = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
        center = torch.stack([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
        expected = project(point[None], fitted)[0][0, 0]
        torch.testing.assert_close(center, expected, atol=0.05 * max(1, size[0] / HEIGHT), rtol=0)


def test_resizing_is_antialiased():
    fine = np.indices((64, 96)).sum(0) % 2 * 255
    image = fit_image(np.repeat(fine[..., None], 3, axis=-1).astype(np.uint8), 8, 12)
    assert (image - 0.5).abs().max() < 0.02


def test_range_is_kept():
    image = np.zeros((20, 20, 3), dtype=np.uint8)
    image[10:] = 255
    fitted = fit_image(image, 10, 10)
    assert fitted.min() == 0 and fitted.max() == 1


# --- Clouds ---


def write_world(folder: Path, views: int = 6, depth: bool = False) -> Scene:
    """Photographs of a coloured wall at z = 3 from cameras in a line; points are found in two views of three.

    The wall's colour is an affine function of the place, so that it is known at any pixel.
    """
    cameras = line(torch.arange(views) * 0.2)
    xy = torch.rand(200, 2, generator=stream(5)) * torch.tensor([3.0, 2.0]) - torch.tensor([1.0, 1.0])
    points = torch.cat([xy, torch.full((200, 1), 3.0)], dim=-1)
    pixels, _ = project(points, cameras)
    inside = ((pixels > 0) & (pixels < torch.tensor([WIDTH, HEIGHT]))).all(-1)
    inside &= (torch.arange(200) + torch.arange(views)[:, None]) % 3 > 0
    paths, depths = [], []
    for view in range(views):
        paths.append(folder / f"{view}.png")
        y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
        pixel = torch.stack([x, y, torch.ones_like(x)], dim=-1)
        place = 3 * pixel @ torch.linalg.inv(cameras.intrinsics[view]).T + cameras.centers[view]
        Image.fromarray((wall_color(place) * 255).round().byte().numpy()).save(paths[-1])
        depths.append(folder / f"depth{view}.png")
        millimetres = np.full((HEIGHT, WIDTH), 3000, dtype=np.uint16)
        millimetres[:10] = 0
        Image.fromarray(millimetres).save(depths[-1])
    return Scene(
        "wall",
        tuple(paths),
        cameras,
        points,
        torch.zeros(200, 3),
        inside.T.nonzero(),
        tuple(depths) if depth else None,
    )


def wall_color(place: Tensor) -> Tensor:
    """[..., 3] in the world to RGB in [0, 1]."""
    return torch.stack([0.5 + 0.1 * place[..., 0], 0.5 + 0.2 * place[..., 1], 0.6 - 0.1 * place[..., 0]], dim=-1)


@pytest.mark.parametrize("points", ["colmap", "depth"])
@pytest.mark.parametrize("size", [(60, 90), (30, 30), (24, 48)])
def test_the_cloud_lies_on_the_surface_and_has_its_colours(tmp_path, monkeypatch, points, size):
    scene = write_world(tmp_path, depth=True)
    made = clips_of(scene, monkeypatch, 1, 5, *size, points)[0]
    ends = [int(made.files[place].removesuffix(".png")) for place in (0, -1)]
    torch.testing.assert_close(made.points[:, 2], torch.full_like(made.points[:, 2], 3.0), atol=1e-5, rtol=0)
    assert (made.colors - wall_color(made.points)).abs().max() < 0.012
    if points == "depth":
        _, top, _, bottom = fit_box(HEIGHT, WIDTH, *size)
        rows = top + (torch.arange(size[0]) + 0.5) * (bottom - top) / size[0]
        assert len(made.points) == 2 * size[1] * (rows >= 10).sum()  # the upper ten rows of the depth maps are unknown
    else:  # a pixel for each point that an end found, where no other hides it
        pixels, _ = project(scene.points, scene.cameras.fitted(*size))
        inside = ((pixels > 0) & (pixels < torch.tensor([size[1], size[0]]))).all(-1)
        cells = [pixels[view][scene.seen_by(view) & inside[view]].floor().unique(dim=0) for view in ends]
        assert len(made.points) == sum(map(len, cells)) > 20


def clips_of(
    scene: Scene, monkeypatch, count: int, frames: int, height: int, width: int, points: str
) -> list[SceneClip]:
    """`scene_clips` on a scene that is open already, nothing filtered."""
    monkeypatch.setattr("fvgen.clips.from_scene.open_source", lambda path, points: Opened(scene, "test", {}))
    settings = ClipSettings(
        frames, height, width, max_stride=4, known_views=2, points=points, clips_per_scene=count, seed=3,
        radius=point_radius(height, width), half_pixel_shift=False, limits=dict.fromkeys(LIMITS, 0.0),
    )  # fmt: skip
    return list(scene_clips(Source(scene.name, Path("nowhere")), range(count), settings))


@pytest.mark.parametrize("depth", [False, True])
def test_nothing_of_the_held_out_photographs_reaches_the_cloud(tmp_path, monkeypatch, depth):
    scene, points = write_world(tmp_path, depth=depth), "depth" if depth else "colmap"
    before = clips_of(scene, monkeypatch, 2, 5, 24, 32, points)
    for made in before:
        clip = made.clip
        ends = {int(clip.cameras.centers[i, 0].div(0.2).round()) for i in (0, -1)}
        held_out = [path for view, path in enumerate(scene.image_paths) if view not in ends]
        contents = {path: path.read_bytes() for path in held_out}
        for path in held_out:
            Image.new("RGB", (WIDTH, HEIGHT), "red").save(path)
        altered = replace(scene, point_colors=torch.ones(200, 3) * torch.tensor([1.0, 0, 0]))
        again = next(c for c in clips_of(altered, monkeypatch, 2, 5, 24, 32, points) if c.clip.name == clip.name)
        assert torch.equal(again.points, made.points) and torch.equal(again.colors, made.colors)
        assert torch.equal(again.clip.render, clip.render) and torch.equal(
            again.clip.truth[[0, -1]], clip.truth[[0, -1]]
        )
        assert not torch.equal(again.clip.truth[1:-1], clip.truth[1:-1])  # the photographs did change
        for path, data in contents.items():
            path.write_bytes(data)


def test_clips(tmp_path, monkeypatch):
    scene = write_world(tmp_path, depth=True)
    clips = clips_of(scene, monkeypatch, 3, 4, 20, 30, "depth")
    assert [made.clip.name for made in clips] == ["wall-00", "wall-01", "wall-02"]
    for made in clips:
        clip = made.clip
        assert made.known == [0, 3] and made.backend == "depth" and clip.known.tolist() == [True, False, False, True]
        assert clip.truth.shape == (4, 3, 20, 30) and clip.truth.min() >= 0 and clip.truth.max() <= 1
        assert (clip.cameras.height, clip.cameras.width, len(clip.cameras)) == (20, 30, 4)
        pixels, _ = project(made.points, clip.cameras)
        for frame in range(4):  # every frame shows the wall where its camera says
            unit = 2 * pixels[frame] / torch.tensor([30.0, 20.0]) - 1
            inside = (unit.abs() < 0.9).all(-1)
            look_up = torch.nn.functional.grid_sample(
                clip.truth[frame][None], unit[inside][None, None], align_corners=False
            )[0, :, 0].T
            assert (look_up - wall_color(made.points[inside])).abs().max() < 0.012
    again = clips_of(scene, monkeypatch, 3, 4, 20, 30, "depth")
    assert all(torch.equal(a.clip.render, b.clip.render) for a, b in zip(clips, again, strict=True))


def test_a_clip_names_every_source_of_its_depth(tmp_path, monkeypatch):
    """One view stops the call for all; alone, the others have better sources than what the last one got."""
    scene, views = write_world(tmp_path, depth=True), []

    def best(scene, views_asked, height, width, backend):
        views.append(list(views_asked))
        if len(views_asked) > 1:
            raise UserError("image 3.png shares too little; leave it out")
        depth = torch.full((1, height, width), 3.0)
        return PointMaps(depth, "sparse" if views_asked[0] < 2 else "fine")

    monkeypatch.setattr("fvgen.clips.from_scene.point_maps", best)
    clips = clips_of(scene, monkeypatch, 3, 4, 20, 30, "auto")
    assert len(views[0]) > 1 and all(len(one) == 1 for one in views[1:])
    ends = {frozenset((made.files[0], made.files[-1])): made.backend for made in clips}
    expected = {("0.png", "3.png"): "fine+sparse", ("1.png", "4.png"): "fine+sparse", ("2.png", "5.png"): "fine"}
    assert ends == {frozenset(pair): backend for pair, backend in expected.items()}


def test_scenes_without_geometry(tmp_path, monkeypatch):
    scene = write_world(tmp_path)
    bare = Scene(scene.name, scene.image_paths, scene.cameras)
    assert len(choose_views(bare, 3, 2, stream())) == 2  # the cameras' own extent sets the scale
    trackless = replace(scene, observations=torch.zeros(0, 2, dtype=torch.int64))
    for one, said in ((bare, "the scene has no COLMAP points"), (trackless, "shows none of the scene's COLMAP points")):
        lost = clips_of(one, monkeypatch, 1, 3, 20, 30, "colmap")
        assert [(row.broken, said in row.reason) for row in lost] == [(True, True)]


# --- The seven real scenes ---

# Bounds of the largest step (radians of turn and parallax): above that of four clips of eight frames, below
# that of neighbours in file order.
REAL = {
    "fox": (0.5, 1.7),
    "hololens_office": (0.5, 0.4),
    "kitchen": (1.1, 4.1),
    "lund_door": (0.35, 0.15),
    "monstree": (1.1, 2.9),
    "ramen": (0.6, 0.8),
    "vr_apartment": (0.5, 0.39),
}


@pytest.mark.parametrize("name", REAL)
def test_real_scenes(shared, monkeypatch, name):
    scene = read_scene(shared / "data" / "scenes" / name)
    depth = project(scene.points, scene.cameras)[1][scene.observations[:, 1], scene.observations[:, 0]].median().item()
    largest, in_file_order = REAL[name]
    assert pose_distance(scene.cameras, depth).diagonal(1).max() > in_file_order
    for views in choose_views(scene, 8, 4, stream()):
        assert pose_distance(scene.cameras[views], depth).diagonal(1).max() < largest
    clips = clips_of(scene, monkeypatch, 2, 8, 48, 64, "depth" if scene.depth_paths else "colmap")
    assert clips
    for made in clips:
        clip = made.clip
        assert clip.truth.shape == (8, 3, 48, 64) and torch.isfinite(made.points).all()
        assert len(made.points) > 150
        pixels, z = project(made.points, clip.cameras[[0, 7]])
        inside = ((pixels > -1e-2) & (pixels < torch.tensor([64.01, 48.01]))).all(-1) & (z > 0)
        assert inside.any(0).all()  # all points come from what the two ends show
        assert made.colors.min() >= 0 and made.colors.max() <= 1
