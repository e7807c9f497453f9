"""Stereo against scenes whose depth is known exactly, and the interface that chooses where depth comes from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scene_files import HEIGHT, VIEWS, WIDTH, document, write_depth, write_images, write_nerfstudio

from fvgen.clips.rooms import make_path, make_scene, render_scene, scene_generator
from fvgen.depth.maps import DEPTHS, Backend, point_maps
from fvgen.errors import UserError
from fvgen.geometry.stereo import stereo_depth
from fvgen.posing.reconstruct import reconstruct
from fvgen.scenes.formats import read_scene
from fvgen.scenes.readers.photographs import Photographs, read_photographs


@pytest.fixture(scope="module")
def room():
    """Six views along a path through a built-in room: images, exact depth, cameras."""
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    generator = scene_generator("train", 7, 3)
    scene = make_scene(generator, "room")
    cameras = make_path(generator, scene, 6, 96, 128)
    images, depth = render_scene(scene, cameras)
    return images, depth, cameras


def test_stereo_finds_the_depth_of_a_room(room):
    images, true, cameras = room
    depth = stereo_depth(images, cameras, [2])[0]
    known = depth > 0
    error = (depth / true[2] - 1).abs()[known]
    assert error.median() < 0.02 and known.float().mean() > 0.6
    assert (error < 0.1).float().mean() > 0.85  # borders of objects are a window's half too fat


@pytest.mark.slow
def test_stereo_knows_no_scale_but_that_of_the_cameras(room):
    """A world ten times as large has depths ten times as large; nothing else changes."""
    images, _, cameras = room
    pose = cameras.world_from_cam.clone()
    pose[:, :3, 3] *= 10
    small, large = stereo_depth(images, cameras, [1]), stereo_depth(images, replace(cameras, world_from_cam=pose), [1])
    both = (small > 0) & (large > 0)
    assert both.float().mean() > 0.5
    assert (large / small / 10 - 1).abs()[both].median() < 1e-3


def test_views_without_features_are_refused(room):
    _, _, cameras = room
    with pytest.raises(UserError, match=r"view 0 shares 0 features.*; add photographs"):
        stereo_depth(torch.full((6, 3, 96, 128), 0.5), cameras, [0])


def test_depth_maps_of_the_scene_come_first(tmp_path):
    write_depth(tmp_path)
    scene = read_scene(write_nerfstudio(tmp_path, document(depth=True)))
    maps = point_maps(scene, [3, 1], HEIGHT // 2, WIDTH // 2)
    assert maps.backend == "depth" and maps.depth.shape == (2, HEIGHT // 2, WIDTH // 2)
    assert maps.depth[0].unique().tolist() == pytest.approx([4.003])
    assert maps.depth[1].unique().tolist() == pytest.approx([4.001])


def test_choice_of_a_backend(tmp_path, monkeypatch):
    scene = read_scene(write_nerfstudio(tmp_path))
    with pytest.raises(UserError, match="did you mean 'stereo'"):
        point_maps(scene, [0], 8, 8, "sterio")
    with pytest.raises(UserError, match=r"'depth' \(the scene has no depth maps\)"):
        point_maps(scene, [0], 8, 8, "depth")
    monkeypatch.setitem(DEPTHS, "stereo", Backend(lambda scene: "no OpenCV", DEPTHS["stereo"].run))
    with pytest.raises(
        UserError,
        match=r"\(depth: the scene has no depth maps, .*stereo: no OpenCV, .*colmap: the scene has .*\); mend",
    ):
        point_maps(scene, [0], 8, 8)
    monkeypatch.setitem(DEPTHS, "flat", Backend(lambda scene: None, lambda scene, views, h, w: torch.ones(1, h, w)))
    assert point_maps(scene, [0], 8, 8).backend == "flat"


def test_stereo_on_noise_names_the_photograph(tmp_path):
    """Photographs that show nothing in common: a sentence with the file's name."""
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    scene = read_scene(write_nerfstudio(tmp_path))
    assert len(scene) == VIEWS
    with pytest.raises(UserError, match=r"images/01\.png shares \d+ features"):
        point_maps(scene, [1], HEIGHT, WIDTH, "stereo")


# --- Poses from COLMAP ---


@pytest.fixture
def pycolmap():
    return pytest.importorskip("pycolmap", reason="pycolmap is not installed")


def test_photographs_that_cannot_be_posed(tmp_path, pycolmap):
    write_images(tmp_path / "photos", [f"{i}.png" for i in range(4)])
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / "images" / f"{i}.png")
    with pytest.raises(UserError, match="only 0 of the 4 photographs of photos could be posed; take more"):
        reconstruct(read_photographs(tmp_path / "photos"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]
    with pytest.raises(UserError, match="already there"):
        reconstruct(read_photographs(tmp_path / "photos"), tmp_path / "photos")


@pytest.mark.slow
def test_colmap_finds_the_published_poses(tmp_path, shared, pycolmap):
    """Up to a similarity: relative rotations agree within a degree, centres within 2 % of their extent."""
    published = read_scene(shared / "data" / "scenes" / "lund_door")
    size = (published.cameras.height, published.cameras.width)
    scene = reconstruct(Photographs("door", published.image_paths, *size), tmp_path / "out")
    views = [[path.name for path in published.image_paths].index(path.name) for path in scene.image_paths]
    assert len(views) >= 11 and scene.points is not None
    ours, theirs = scene.cameras, published.cameras[views]
    relative = [c.world_from_cam[0, :3, :3].T @ c.world_from_cam[:, :3, :3] for c in (ours, theirs)]
    angle = 2 * ((relative[0] - relative[1]).flatten(1).norm(dim=-1) / 8**0.5).asin()
    assert torch.rad2deg(angle).max() < 1
    offset = [(c.centers - c.centers[0]) @ c.world_from_cam[0, :3, :3] for c in (ours, theirs)]
    scaled = offset[0] * (offset[0] * offset[1]).sum() / (offset[0] ** 2).sum()
    assert (scaled - offset[1]).norm(dim=-1).max() < 0.02 * offset[1].norm(dim=-1).max()
