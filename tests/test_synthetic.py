"""The built-in scenes: closed-form surfaces, views that agree with each other, and streams that never meet."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fvgen.clips.rooms import (
    GENERATION,
    Room,
    Solid,
    SyntheticScene,
    clear_the_way,
    drawn_scene,
    make_path,
    make_scene,
    render_scene,
    scene_generator,
    synthetic_clip,
)
from fvgen.clips.textures import PATTERNS, Texture, color_at, fractal_noise, lattice_hash, value_noise
from fvgen.clips.worlds import WORLDS
from fvgen.geometry.cameras import Cameras, look_at, pinhole, pose_problem, project
from fvgen.geometry.pointcloud import render_points, unproject

FRAMES, HEIGHT, WIDTH = 3, 24, 32
PLAIN = Texture("marble", 1.0, torch.full((2, 3), 0.5), grain=0.0, seed=1)  # grey everywhere
SOLIDS = {
    "box": Solid("box", torch.tensor([1.0, 0.0, 1.5]), torch.tensor([0.5, 0.4, 0.3]), 0.0, PLAIN),
    "ellipsoid": Solid("ellipsoid", torch.tensor([1.0, 0.0, 1.5]), torch.tensor([0.5, 0.5, 0.5]), 0.7, PLAIN),
}


def room_with(*solids: Solid) -> SyntheticScene:
    """A grey room of 6 x 4 x 3 m, lit from the middle of its ceiling."""
    room = Room(torch.tensor([-3.0, -2.0, 0.0]), torch.tensor([3.0, 2.0, 3.0]), (PLAIN,) * 6)
    return SyntheticScene("by hand", room, solids, torch.tensor([0.0, 0.0, 2.9]), 0.4)


def looking(position: list[float], target: list[float], size: int = 32, fov: float = 90) -> Cameras:
    """One square view; with an even size no pixel's centre is exactly on the optical axis."""
    pose = look_at(torch.tensor([position]), torch.tensor([target]), torch.tensor([0.0, 0.0, 1.0]))
    return Cameras(pose, pinhole(1, size, size, fov), size, size)


@pytest.fixture(scope="module", params=[1, 2, 3])
def drawn(request) -> tuple[SyntheticScene, Cameras, Tensor, Tensor]:
    """A drawn scene with its path, images and depth."""
    generator = scene_generator("test", 0, request.param)
    scene = make_scene(generator, "drawn")
    cameras = make_path(generator, scene, FRAMES, HEIGHT, WIDTH)
    return scene, cameras, *render_scene(scene, cameras)


def height_above(solid: Solid, points: Tensor) -> Tensor:
    """[N]: how far points [N, 3] are outside the solid, in units of its half-extents; negative inside."""
    c, s = math.cos(solid.yaw), math.sin(solid.yaw)
    x, y, z = (points - solid.center).unbind(-1)
    local = torch.stack([c * x + s * y, c * y - s * x, z], dim=-1) / solid.half
    return (local.abs().amax(-1) if solid.shape == "box" else local.norm(dim=-1)) - 1


def wall_gap(scene: SyntheticScene, points: Tensor) -> Tensor:
    """[N]: metres to the nearest wall, negative outside the room."""
    return torch.cat([points - scene.room.low, scene.room.high - points], dim=-1).amin(-1)


def tangents(fov: float) -> Tensor:
    """[32]: how far right (or down) of the optical axis each pixel's centre looks, at depth one."""
    return ((torch.arange(32) + 0.5) / 16 - 1) * math.tan(math.radians(fov / 2))


# --- Closed forms ---


def test_depth_of_an_empty_room():
    """From the middle along x, at 90 degrees: the far wall fills what it spans, the side walls the rest."""
    _, depth = render_scene(room_with(), looking([0, 0, 1.5], [3, 0, 1.5]))
    tangent = tangents(90).abs()
    expected = torch.minimum(2 / tangent[None, :], 1.5 / tangent[:, None]).clamp(max=3)
    torch.testing.assert_close(depth[0], expected, rtol=1e-5, atol=0)


def test_depth_along_a_level_ray():
    """Components of exactly zero: the wall is straight ahead, and no other face is nearer."""
    _, depth = render_scene(room_with(), looking([0, 0, 1.5], [3, 0, 1.5], size=1))
    assert depth.item() == pytest.approx(3)


def test_depth_of_a_box_seen_head_on():
    """Its face is at one depth: centre at 4 m, half a metre thick, 0.4 m to each side and 0.3 m up and down."""
    _, depth = render_scene(room_with(SOLIDS["box"]), looking([-2.9, 0, 1.5], [0, 0, 1.5], fov=40))
    tangent = tangents(40)
    face = (tangent[None, :].abs() < 0.4 / 3.4) & (tangent[:, None].abs() < 0.3 / 3.4)
    assert face.sum() > 50
    torch.testing.assert_close(depth[0][face], torch.full((int(face.sum()),), 3.4), rtol=1e-5, atol=0)
    assert (depth[0][~face] > 3.4 + 1e-3).all()


def test_depth_of_a_sphere():
    """|o + t d| = r by hand, with the ray's z component one."""
    _, depth = render_scene(room_with(SOLIDS["ellipsoid"]), looking([-2.0, 0, 1.5], [0, 0, 1.5], fov=40))
    tangent = tangents(40)
    squared = 1 + tangent[None, :] ** 2 + tangent[:, None] ** 2
    root = 9 - squared * (9 - 0.25)
    sphere = root > 1e-3
    assert 100 < sphere.sum() < 900
    torch.testing.assert_close(depth[0][sphere], ((3 - root.clamp(min=0).sqrt()) / squared)[sphere], rtol=1e-4, atol=0)
    assert (depth[0][root < -1e-3] > 3).all()


def test_brightness_of_a_wall_follows_the_light():
    """Lambert: ambient + (1.35 - ambient) cos / (1 + 0.08 d^2), for a point light without shadow."""
    scene = room_with()
    cameras = looking([0, 0, 1.5], [3, 0, 1.5], size=10)
    images, depth = render_scene(scene, cameras)
    points, _ = unproject(depth, images, cameras)
    wall = (points[:, 0] > 3 - 1e-4) & (points[:, 1:].abs().amax(-1) < 1.9)
    to_light = scene.light - points[wall]
    cosine = -to_light[:, 0] / to_light.norm(dim=-1)
    expected = 0.5 * (0.4 + 0.95 * cosine / (1 + 0.08 * to_light.square().sum(-1)))
    for channel in images[0]:
        torch.testing.assert_close(channel.flatten()[wall], expected, rtol=0, atol=0.01)  # a mean over the pixel


@pytest.mark.parametrize("shape", sorted(SOLIDS))
def test_an_opaque_object_only_darkens_the_rest(shape):
    cameras = looking([-2.5, -1.5, 1.0], [1.5, 0.5, 0.5])
    before, depth_before = render_scene(room_with(), cameras)
    after, depth_after = render_scene(room_with(SOLIDS[shape]), cameras)
    same = torch.nn.functional.max_pool2d((depth_before != depth_after).float(), 3, 1, 1) == 0  # not its outline
    assert (depth_after <= depth_before).all() and 0.5 < same.float().mean() < 1
    change = (after - before)[0][:, same[0]]
    assert change.max() <= 1e-6 and change.min() < -0.05  # its shadow


# --- Drawn scenes ---


def test_images_depth_and_poses_are_sound(drawn):
    scene, cameras, images, depth = drawn
    assert images.shape == (FRAMES, 3, HEIGHT, WIDTH) and depth.shape == (FRAMES, HEIGHT, WIDTH)
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.02
    assert torch.isfinite(depth).all() and depth.min() > 0
    assert all(pose_problem(pose) is None for pose in cameras.world_from_cam)
    assert 3 <= len(scene.solids) <= 7


def test_every_pixel_shows_a_surface_and_nothing_stands_before_it(drawn):
    """Unprojected depth lies on a wall or an object, and the way there crosses no object."""
    scene, cameras, images, depth = drawn
    points, _ = unproject(depth, images, cameras)
    gap = wall_gap(scene, points)
    above = torch.stack([height_above(solid, points) for solid in scene.solids])
    assert gap.min() > -1e-3 and above.min() > -1e-3
    assert torch.minimum(gap.abs(), above.abs().amin(0)).max() < 1e-3
    origins = cameras.centers.repeat_interleave(HEIGHT * WIDTH, dim=0)
    for share in torch.linspace(0.02, 0.98, 33):
        passing = torch.lerp(origins, points, share)
        assert min(height_above(solid, passing).min() for solid in scene.solids) > -1e-3


def test_two_views_agree(drawn):
    """A ray from one camera towards what another sees ends there or before, never behind."""
    scene, cameras, images, depth = drawn
    points, _ = unproject(depth[:1], images[:1], cameras[:1])
    points = points[::7]
    for view in range(FRAMES):
        position = cameras.centers[view].expand_as(points)
        rays = look_at(position, points, torch.tensor([0.0, 0.0, 1.0]))
        _, found = render_scene(scene, Cameras(rays, pinhole(len(points), 1, 1, 60), 1, 1))
        ratio = found[:, 0, 0] / (points - position).norm(dim=-1)
        assert ratio.max() < 1 + 1e-3
        # From the same place all of it is seen; from another, what is not hidden.
        assert (ratio > 1 - 1e-3).float().mean() > (0.999 if view == 0 else 0.2)


def test_the_cloud_of_one_view_looks_like_the_truth_in_another(drawn):
    """Where the nearest point is as far as the true surface, its colour is the surface's."""
    _, cameras, images, depth = drawn
    cloud = unproject(depth[[0, -1]], images[[0, -1]], cameras[[0, -1]])
    image, visible, found = render_points(*cloud, cameras[1:2], radius=0.12)
    truth = images[1].permute(1, 2, 0)
    seen = (visible[0] > 0.9) & ((found[0] / depth[1] - 1).abs() < 0.03)
    assert seen.float().mean() > 0.2
    error = (image[0] - truth)[seen].abs().mean()
    guess = (truth - truth[seen].mean(0))[seen].abs().mean()
    assert error < 0.05 and error < 0.5 * guess


def test_paths_stay_in_the_room_and_move_evenly():
    for index in range(60):
        generator = scene_generator("train", 3, index)
        scene = make_scene(generator, "drawn")
        centers = make_path(generator, scene, 8, HEIGHT, WIDTH).centers
        assert wall_gap(scene, centers).min() > 0.1
        steps = centers.diff(dim=0).norm(dim=-1)
        assert steps.min() > 0.02 and steps.max() < 2 * steps.min()
        points = torch.stack([solid.center for solid in scene.solids])
        assert wall_gap(scene, points).min() > 0 and wall_gap(scene, scene.light[None]) > 0.1


def test_no_camera_is_inside_an_object():
    """Objects go where one stands in the way, at any of the cameras, and only then; their order stays."""
    removed = 0
    for index in range(60):
        generator = scene_generator("train", 3, index)
        scene = make_scene(generator, "drawn")
        cameras = make_path(generator, scene, 8, HEIGHT, WIDTH)
        kept = [id(solid) for solid in clear_the_way(scene, cameras).solids]
        assert kept == [id(solid) for solid in scene.solids if id(solid) in kept]
        for solid in scene.solids:
            gap = height_above(solid, cameras.centers).min()
            assert gap > 0 if id(solid) in kept else gap < 0.1 / 0.18  # clearance over the smallest half-extent
        removed += len(scene.solids) - len(kept)
    assert removed > 0


@pytest.mark.parametrize("shape", SOLIDS)
def test_objects_keep_their_clearance(shape):
    """The solid ends at x = 0.5: it stays for a camera 11 cm before it and goes for one 9 cm before it."""
    scene = room_with(SOLIDS[shape])
    for x, left in ((0.39, 1), (0.41, 0), (1.0, 0)):
        assert len(clear_the_way(scene, looking([x, 0, 1.5], [3, 0, 1.0])).solids) == left


# --- Seeds ---


def test_a_scene_can_be_made_again_bit_by_bit():
    first, again = (synthetic_clip("test", 5, 7, FRAMES, HEIGHT, WIDTH) for _ in range(2))
    assert first.name == again.name == "test-5-00007"
    assert torch.equal(first.truth, again.truth) and torch.equal(first.render, again.render)
    assert first.known.tolist() == [True, False, True]


def test_the_global_random_state_plays_no_part():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = synthetic_clip("test", 5, 8, 2, 12, 16)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(synthetic_clip("test", 5, 8, 2, 12, 16).render, first.render)


@pytest.mark.parametrize("other", [("train", 0, 0), ("test", 1, 0), ("test", 0, 1)])
def test_split_seed_and_index_all_matter(other):
    ours = synthetic_clip("test", 0, 0, 2, 12, 16)
    assert (synthetic_clip(*other, 2, 12, 16).truth - ours.truth).abs().mean() > 0.01


def test_streams_never_meet():
    """All of 2 splits x 5 seeds x 500 scenes start from different states."""
    splits = ("train", "test")
    seeds = {scene_generator(s, seed, i).initial_seed() for s in splits for seed in range(5) for i in range(500)}
    assert len(seeds) == 5000


def test_a_change_of_the_scenes_needs_a_new_generation():
    """Shipped weights and cached clips rest on these numbers; whoever changes them raises GENERATION."""
    recorded = {3: [0.368, 0.3225, 0.2936, 0.0652, 0.0441, 0.0353]}
    assert GENERATION in recorded, "record the numbers of the new generation here"
    clip = synthetic_clip("train", 0, 0, 3, 12, 16)
    found = [*clip.truth.mean((0, 2, 3)).tolist(), *clip.render[1].mean((1, 2)).tolist()]
    assert found == pytest.approx(recorded[GENERATION], abs=2e-3)


# --- Textures ---


@given(st.integers(-(2**20), 2**20), st.integers(-(2**20), 2**20), st.integers(0, 2**30))
@settings(max_examples=50, deadline=None)
def test_noise_passes_through_its_lattice_values(x, y, seed):
    value = lattice_hash(torch.tensor(x), torch.tensor(y), seed)
    assert 0 <= value < 1
    assert value_noise(torch.tensor([float(x), float(y)]), seed) == value


def test_the_hash_looks_uniform_and_independent():
    x, y = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    for seed in (0, 1, 12345):
        values = lattice_hash(x, y, seed)
        counts = torch.histc(values, 20, 0, 1)
        assert ((counts - 2000) ** 2 / 2000).sum() < 50  # chi-square, 19 degrees of freedom: p < 1e-4
        others = (values.roll(1, 0), values.roll(1, 1), values.T, lattice_hash(x, y, seed + 1))
        for other in others:
            assert torch.corrcoef(torch.stack([values.flatten(), other.flatten()]))[0, 1].abs() < 0.025  # 5 sigma


def test_noise_is_continuous():
    """Smoothstep has slope 1.5 at most, so a step of 0.01 along u and v changes value noise by at most 0.03."""
    generator = torch.Generator().manual_seed(0)
    uv = torch.rand(5000, 2, generator=generator) * 20
    step = (torch.rand(5000, 2, generator=generator) - 0.5) * 0.02
    assert (value_noise(uv + step, 3) - value_noise(uv, 3)).abs().max() < 0.03
    noise = fractal_noise(uv, 3, octaves=4)
    assert noise.min() >= 0 and noise.max() < 1 and noise.std() > 0.1


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_patterns_blend_two_colours(pattern):
    """Without grain every colour lies between the two; both ends of the blend are used, and so is the scale."""
    colors = torch.tensor([[0.1, 0.2, 0.3], [0.9, 0.6, 0.5]])
    uv = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)) * 10
    texture = Texture(pattern, 0.7, colors, grain=0.0, seed=11)
    found = color_at(texture, uv)
    assert (found >= colors[0] - 1e-6).all() and (found <= colors[1] + 1e-6).any()
    blend = (found - colors[0]) / (colors[1] - colors[0])
    torch.testing.assert_close(blend, blend[:, :1].expand_as(blend), rtol=0, atol=1e-5)
    assert blend.min() < 0.25 and blend.max() > 0.75 and blend.std() > 0.1
    larger = Texture(pattern, 1.4, colors, grain=0.0, seed=11)
    torch.testing.assert_close(color_at(larger, 2 * uv), found, rtol=0, atol=1e-4)


def test_grain_keeps_colours_in_range():
    uv = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)) * 10
    bright = Texture("marble", 1.0, torch.tensor([[0.9, 0.9, 0.9], [1.0, 1.0, 1.0]]), grain=0.9, seed=2)
    found = color_at(bright, uv)
    assert found.min() >= 0 and found.max() == 1 and found.std() > 0.05


def test_views_off_the_path_are_free_and_change_no_clip():
    plain = synthetic_clip("train", 0, 3, 4, 24, 32)
    clip = synthetic_clip("train", 0, 3, 4, 24, 32, others=5)
    assert torch.equal(clip.truth, plain.truth) and torch.equal(clip.render, plain.render)
    assert clip.others.images.shape == (5, 3, 24, 32) and clip.others.depth.shape == (4 + 5, 24, 32)
    assert torch.equal(synthetic_clip("train", 0, 3, 4, 24, 32, others=5).others.images, clip.others.images)
    between = torch.cdist(clip.others.cameras.centers, clip.cameras.centers).amin(dim=1)
    extent = torch.cdist(clip.cameras.centers, clip.cameras.centers).max()
    assert (between > 0.05 * extent).sum() >= 4  # off the path, all but one that lies before a frame
    # what another view's depth says is where a frame sees the same point, where nothing is in between
    points, colors = unproject(clip.others.depth[4:5], clip.others.images[:1], clip.others.cameras[[0]])
    pixels, depth = project(points, clip.cameras[[1]])
    x, y = pixels[0].floor().long().unbind(-1)
    inside = (x >= 0) & (y >= 0) & (x < 32) & (y < 24) & (depth[0] > 0)
    theirs = clip.others.depth[1][y[inside], x[inside]]
    agree = (theirs / depth[0][inside] - 1).abs() < 0.05
    assert inside.sum() > 100 and agree.float().mean() > 0.6
    difference = (clip.truth[1][:, y[inside], x[inside]].T - colors[inside])[agree].abs().mean()
    assert difference < 0.1


def test_clips_of_a_world_with_several_paths_part_from_one_frame():
    world = WORLDS["builtin-paths"]
    clips = [synthetic_clip("test", 0, index, 4, 24, 32, world) for index in range(2 * world.paths)]
    rooms = clips[: world.paths], clips[world.paths :]
    for room in rooms:
        for clip in room[1:]:
            assert torch.equal(clip.truth[0], room[0].truth[0])
            assert torch.equal(clip.cameras.world_from_cam[0], room[0].cameras.world_from_cam[0])
            assert (clip.truth[-1] - room[0].truth[-1]).abs().mean() > 0.01
    assert (rooms[0][0].truth[0] - rooms[1][0].truth[0]).abs().mean() > 0.01
    assert len({clip.name for clip in clips}) == len(clips)


@pytest.mark.parametrize("index", range(8))
def test_paths_that_part_stay_where_a_camera_may_be(index):
    scene, path, _ = drawn_scene("train", 0, index, 5, 24, 32, WORLDS["builtin-paths"])
    assert all(pose_problem(pose) is None for pose in path.world_from_cam)
    assert (wall_gap(scene, path.centers) > 0.099).all()  # 0.1, and a wall at 3.5 m rounds to 2e-7
    assert not any(height_above(solid, path.centers).min() < 0 for solid in scene.solids)
    moved = path.centers.double().diff(dim=0).norm(dim=1).sum()
    assert moved < 0.5 * (1 + 1e-5)
