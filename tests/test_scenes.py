"""Readers against scenes that the tests write themselves, against pycolmap, and against damaged input."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scene_files import (
    HEIGHT,
    NAMES,
    VIEWS,
    WIDTH,
    document,
    save_turned,
    world,
    write_colmap,
    write_depth,
    write_nerfstudio,
)

from fvgen.geometry.cameras import project
from fvgen.scenes.formats import Scene, find_scenes, load_depth, load_image, read_scene


def check_cameras(scene: Scene) -> None:
    cameras = world()[0]
    assert [path.name for path in scene.image_paths] == NAMES
    assert (scene.cameras.height, scene.cameras.width) == (HEIGHT, WIDTH)
    assert scene.cameras.world_from_cam.dtype == scene.cameras.intrinsics.dtype == torch.float32
    torch.testing.assert_close(scene.cameras.world_from_cam.double(), cameras.world_from_cam, atol=1e-6, rtol=0)
    torch.testing.assert_close(scene.cameras.intrinsics.double(), cameras.intrinsics, atol=1e-6, rtol=0)


def check_points(scene: Scene) -> None:
    _, points, found = world()
    torch.testing.assert_close(scene.points.double(), points, atol=1e-6, rtol=0)
    n = torch.arange(len(points), dtype=torch.float32)
    torch.testing.assert_close(scene.point_colors, torch.stack([n, 2 * n, 255 - n], dim=-1) / 255)
    seen = torch.stack([scene.seen_by(view) for view in range(VIEWS)], dim=-1)
    assert torch.equal(seen, found)


# --- What the readers must read ---


def test_nerfstudio(tmp_path):
    scene = read_scene(write_nerfstudio(tmp_path / "desk"))
    check_cameras(scene)
    assert scene.name == "desk" and len(scene) == VIEWS
    assert scene.points is None and scene.depth_paths is None


@pytest.mark.parametrize("binary", [True, False])
def test_colmap(tmp_path, binary):
    scene = read_scene(write_colmap(tmp_path, binary))
    check_cameras(scene)
    check_points(scene)


def test_nerfstudio_takes_the_points_beside_it(tmp_path):
    scene = read_scene(write_colmap(write_nerfstudio(tmp_path)))
    check_cameras(scene)
    check_points(scene)


def test_points_of_images_that_transforms_json_leaves_out(tmp_path):
    contents = document()
    contents["frames"] = contents["frames"][1:3]
    scene = read_scene(write_colmap(write_nerfstudio(tmp_path, contents)))
    found = world()[2]
    assert torch.equal(scene.seen_by(0), found[:, 1]) and torch.equal(scene.seen_by(1), found[:, 2])
    assert scene.observations.shape[0] == found[:, 1:3].sum()


def test_colmap_without_points(tmp_path):
    (write_colmap(tmp_path) / "sparse" / "0" / "points3D.bin").unlink()
    scene = read_scene(tmp_path)
    check_cameras(scene)
    assert scene.points is None and scene.observations is None


def test_simple_pinhole_in_a_flat_folder(tmp_path):
    model = write_colmap(tmp_path) / "sparse"
    for file in (model / "0").iterdir():
        file.rename(model / file.name)
    (model / "0").rmdir()
    (model / "cameras.bin").write_bytes(struct.pack("<QIiQQ3d", 1, 7, 0, WIDTH, HEIGHT, 30.0, 12.0, 9.0))
    expected = torch.tensor([[30.0, 0, 12], [0, 30, 9], [0, 0, 1]]).expand(VIEWS, 3, 3)
    torch.testing.assert_close(read_scene(tmp_path).cameras.intrinsics, expected)


def test_intrinsics_per_frame_and_paths_without_suffix(tmp_path):
    contents = document()
    for i, frame in enumerate(contents["frames"]):
        frame["fl_x"] = 20.0 + i
        frame["file_path"] = f"./images/{i:02d}"
    scene = read_scene(write_nerfstudio(tmp_path, contents))
    assert scene.cameras.intrinsics[:, 0, 0].tolist() == [20.0, 21.0, 22.0, 23.0]
    assert [path.name for path in scene.image_paths] == NAMES


def test_field_of_view_stands_in_for_the_focal_length(tmp_path):
    contents = {"camera_angle_x": math.pi / 2, "frames": document()["frames"]}
    matrix = read_scene(write_nerfstudio(tmp_path, contents)).cameras.intrinsics[0]
    torch.testing.assert_close(matrix, torch.tensor([[12.0, 0, 12], [0, 12, 9], [0, 0, 1]]))


def test_depth_maps(tmp_path):
    write_depth(tmp_path)
    scene = read_scene(write_nerfstudio(tmp_path, document(depth=True) | {"depth_unit_scale_factor": 0.002}))
    depth = load_depth(scene.depth_paths[3], scene.depth_unit)
    torch.testing.assert_close(depth, torch.full((HEIGHT, WIDTH), 4003 * 0.002))


def test_find_scenes(tmp_path):
    for name in ("b", "a"):
        write_nerfstudio(tmp_path / name)
    write_colmap(tmp_path / "c")
    (tmp_path / "notes").mkdir()
    assert find_scenes(tmp_path) == [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    assert find_scenes(tmp_path / "a") == [tmp_path / "a"]


def test_format_can_be_chosen(tmp_path):
    write_colmap(write_nerfstudio(tmp_path))
    contents = document()
    contents["frames"] = contents["frames"][:2]
    (tmp_path / "transforms.json").write_text(json.dumps(contents))
    assert len(read_scene(tmp_path)) == 2 and len(read_scene(tmp_path, "colmap")) == VIEWS


@pytest.fixture
def pycolmap():
    return pytest.importorskip("pycolmap", reason="pycolmap, the reference reader, is not installed")


def test_pycolmap_reads_the_same(tmp_path, pycolmap):
    folder = write_colmap(tmp_path)
    compare_with_pycolmap(pycolmap, folder, read_scene(folder))


def test_text_that_pycolmap_wrote(tmp_path, pycolmap):
    model = write_colmap(tmp_path) / "sparse" / "0"
    reconstruction = pycolmap.Reconstruction(str(model))
    for file in model.iterdir():
        file.unlink()
    reconstruction.write_text(str(model))
    assert (model / "images.txt").is_file()
    compare_with_pycolmap(pycolmap, tmp_path, read_scene(tmp_path))


def compare_with_pycolmap(pycolmap, folder: Path, scene: Scene) -> None:
    model = pycolmap.Reconstruction(str(folder / "sparse" / "0"))
    views = {path.name: view for view, path in enumerate(scene.image_paths)}
    pose = scene.cameras.cam_from_world
    for image in model.images.values():
        view = views[image.name]
        expected = torch.tensor(image.cam_from_world().matrix())
        torch.testing.assert_close(pose[view, :3].double(), expected, atol=2e-5, rtol=1e-6)
        expected = torch.tensor(model.cameras[image.camera_id].calibration_matrix())
        torch.testing.assert_close(scene.cameras.intrinsics[view].double(), expected, atol=1e-4, rtol=1e-6)
    ours = {tuple(xyz): set() for xyz in scene.points.tolist()}
    for point, view in scene.observations.tolist():
        ours[tuple(scene.points[point].tolist())].add(view)
    theirs = {
        tuple(np.float32(point.xyz).tolist()): {views[model.images[e.image_id].name] for e in point.track.elements}
        for point in model.points3D.values()
    }
    assert ours == theirs


# --- Images ---


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA", "LA", "I;16"])
def test_every_kind_of_pixel_becomes_rgb(tmp_path, mode):
    ramp = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (8, 1))
    deep = Image.fromarray(ramp.astype(np.uint16) * 257)
    image = deep if mode == "I;16" else Image.fromarray(ramp).convert(mode)
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(file)
    read = load_image(file)
    assert read.dtype == np.uint8 and read.shape == (8, 16, 3)
    if mode != "1":
        assert np.abs(read.astype(int) - ramp[..., None]).max() <= 2


def test_transparent_pixels_are_white(tmp_path):
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[:2, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    read = load_image(tmp_path / "a.png")
    assert (read[:2] == 0).all() and (read[2:] == 255).all()


def test_exif_turn_is_applied(tmp_path):
    pixels = save_turned(tmp_path / "a.png", 6)
    assert np.array_equal(load_image(tmp_path / "a.png"), np.rot90(pixels, -1))


def test_exif_turn_in_a_scene(tmp_path):
    write_nerfstudio(tmp_path)
    for name in NAMES:  # stored lying down, the cameras were made for the upright image
        save_turned(tmp_path / "images" / name, 8, (HEIGHT, WIDTH))
    check_cameras(read_scene(tmp_path))


# --- The seven real scenes ---

REAL = {  # views, height, width, points, mean reprojection error in pixels: data/README.md
    "fox": (50, 768, 432, 7732, 0.50),
    "hololens_office": (31, 360, 540, 2874, 0.89),
    "kitchen": (23, 512, 768, 1522, 0.32),
    "lund_door": (12, 768, 513, 11384, 0.14),
    "monstree": (19, 768, 576, 3621, 0.46),
    "ramen": (32, 334, 446, 2636, 0.73),
    "vr_apartment": (32, 768, 507, 1764, 0.55),
}


@pytest.mark.parametrize("name", REAL)
def test_real_scenes(shared, name):
    folder = shared / "data" / "scenes" / name
    views, height, width, points, _ = REAL[name]
    scene, model = read_scene(folder), read_scene(folder, "colmap")
    assert (len(scene), scene.cameras.height, scene.cameras.width, len(scene.points)) == (
        views,
        height,
        width,
        points,
    )
    assert load_image(scene.image_paths[0]).shape == (height, width, 3)
    by_name = {path: view for view, path in enumerate(model.image_paths)}
    same = model.cameras[[by_name[path] for path in scene.image_paths]]
    torch.testing.assert_close(same.world_from_cam, scene.cameras.world_from_cam, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(same.intrinsics, scene.cameras.intrinsics, atol=1e-3, rtol=1e-5)
    assert (scene.depth_paths is not None) == (name == "hololens_office")
    point, view = scene.observations.unbind(1)
    _, depth = project(scene.points, scene.cameras)
    assert (depth[view, point] > 0).all()


@pytest.mark.parametrize("name", ["kitchen", "vr_apartment"])
def test_real_scenes_against_pycolmap(shared, pycolmap, name):
    folder = shared / "data" / "scenes" / name
    scene = read_scene(folder)
    compare_with_pycolmap(pycolmap, folder, scene)
    model = pycolmap.Reconstruction(str(folder / "sparse" / "0"))
    row = {tuple(xyz): n for n, xyz in enumerate(scene.points.tolist())}
    row_of = {number: row[tuple(np.float32(point.xyz).tolist())] for number, point in model.points3D.items()}
    views = {path.name: view for view, path in enumerate(scene.image_paths)}
    keys = [
        (row_of[key.point3D_id], views[image.name], *key.xy.tolist())
        for image in model.images.values()
        for key in image.points2D
        if key.has_point3D()
    ]
    point, view, x, y = torch.tensor(keys).unbind(1)
    found = project(scene.points, scene.cameras)[0][view.long(), point.long()]
    error = (found - torch.stack([x, y], dim=-1)).norm(dim=-1).mean().item()
    assert error == pytest.approx(REAL[name][4], abs=0.01)


def test_real_depth(shared):
    scene = read_scene(shared / "data" / "scenes" / "hololens_office")
    ratios = []
    pixels, depth = project(scene.points, scene.cameras)
    for view in range(0, len(scene), 6):
        measured = load_depth(scene.depth_paths[view], scene.depth_unit)
        seen = scene.seen_by(view)
        x, y = pixels[view, seen].long().unbind(-1)
        inside = (x >= 0) & (y >= 0) & (x < scene.cameras.width) & (y < scene.cameras.height)
        value = measured[y[inside], x[inside]]
        ratios.append((value / depth[view, seen][inside])[value > 0])
    assert torch.cat(ratios).median().item() == pytest.approx(0.990, abs=0.01)
