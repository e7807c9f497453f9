"""Damaged and senseless scenes: each gives one sentence that says what, where and how to mend it."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
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
    write_colmap,
    write_depth,
    write_images,
    write_nerfstudio,
)

from fvgen.errors import UserError
from fvgen.geometry.cameras import pose_problem
from fvgen.scenes.formats import find_scenes, load_depth, load_image, read_scene


def expect(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_scene(folder)
    check_sentence(caught.value)
    for word in words:
        assert word in str(caught.value), caught.value


def check_sentence(error: UserError) -> None:
    """One line of bounded length with a cure after the semicolon."""
    message = str(error)
    assert "\n" not in message and len(message) < 600 and ";" in message, message


def change(**values: object) -> Callable[[dict], None]:
    return lambda contents: contents.update(values)


def change_frame(**values: object) -> Callable[[dict], None]:
    return lambda contents: contents["frames"][2].update(values)


def change_pose(row: int, column: int, value: object) -> Callable[[dict], None]:
    def apply(contents: dict) -> None:
        contents["frames"][2]["transform_matrix"][row][column] = value

    return apply


BAD_JSON = {
    "focal as a string": (change(fl_x="20"), "fl_x is '20'", "frame 0"),
    "focal negative": (change_frame(fl_x=-3.0), "fl_x is -3.0", "positive", "frame 2 ('images/02.png')"),
    "focal NaN": (change(fl_y=math.nan), "fl_y is nan"),
    "focal as a fraction": (change(fl_x=0.8), "focal length 0.8", "pixels"),
    "focal absent": (lambda contents: contents.pop("fl_x"), "neither fl_x nor camera_angle_x"),
    "focal true": (change(fl_x=True), "fl_x is True"),
    "focal beyond floats": (change(fl_x=10**400), "fl_x is 1000"),
    "field of view in degrees": (change(fl_x=None, camera_angle_x=50.0), "camera_angle_x is 50.0", "radians"),
    "centre far outside": (change(cx=4000), "cx = 4000", "pixels"),
    "distortion of higher order": (change(k4=0.1), "distortion k4", "undistort"),
    "distortion that folds the image": (change(k1=-4.0), "distortion -4, 0, 0, 0", "undistort"),
    "distortion beyond reason": (change(k1=1e20), "distortion 1e+20", "undistort"),
    "fisheye": (change(camera_model="OPENCV_FISHEYE"), "'OPENCV_FISHEYE'", "undistort"),
    "other size": (change(w=48, h=36), "is 24x18 but its camera says 48x36", "00.png"),
    "size zero": (change(w=0), "w is 0", "positive"),
    "NaN in a pose": (change_pose(1, 1, math.nan), "holds nan", "frame 2"),
    "text in a pose": (change_pose(0, 3, "x"), "holds 'x'", "frame 2"),
    "scaled pose": (change_pose(0, 0, 1.2), "no rotation", "frame 2"),
    "far pose": (change_pose(0, 3, 5e6), "off the origin", "frame 2"),
    "pose of 3x3": (change_frame(transform_matrix=[[1, 0, 0]] * 3), "not four numbers", "frame 2"),
    "no pose": (change_frame(transform_matrix=None), "transform_matrix is missing", "frame 2"),
    "no frames": (change(frames=[]), "no poses", "transforms.json"),
    "frames of another type": (change(frames={"a": 1}), "no poses"),
    "frame of another type": (change(frames=["images/00.png"]), "frame 0", "no file_path"),
    "duplicate frame": (change_frame(file_path="./images/01"), "same image", "frame 1", "frame 2"),
    "missing image": (change_frame(file_path="images/77.png"), "'images/77.png'", "missing", "frame 2"),
    "depth for some": (change_frame(depth_file_path="depth/02.png"), "frame 0", "no depth_file_path"),
    "depth unit": (change(depth_unit_scale_factor=0), "depth_unit_scale_factor is 0"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_transforms(tmp_path, case):
    mutate, *words = BAD_JSON[case]
    contents = document()
    mutate(contents)
    expect(write_nerfstudio(tmp_path, contents), *words)


def test_unknown_format(tmp_path):
    with pytest.raises(UserError, match="did you mean 'colmap'"):
        read_scene(write_colmap(tmp_path), "colmpa")


def test_exif_turn_that_does_not_fit_the_camera(tmp_path):
    write_nerfstudio(tmp_path)
    save_turned(tmp_path / "images" / NAMES[1], 8)  # the camera was made for the pixels as stored, as the sizes tell
    assert read_scene(tmp_path).as_stored == {1} and read_scene(tmp_path).image(1).shape == (HEIGHT, WIDTH, 3)
    save_turned(tmp_path / "images" / NAMES[1], 3)  # upside down: sizes cannot tell
    expect(tmp_path, "01.png", "EXIF orientation 3", "remove the tag")


def test_mirrored_pose(tmp_path):
    contents = document()
    for row in contents["frames"][1]["transform_matrix"][:3]:
        row[0] = -row[0]
    expect(write_nerfstudio(tmp_path, contents), "mirrored", "frame 1")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"frames": ', "\x00", '{"a": 1e5', "null", "[1]", '"x"'])
def test_malformed_json(tmp_path, text):
    write_images(tmp_path)
    (tmp_path / "transforms.json").write_text(text)
    expect(tmp_path, "transforms.json", "export the poses again")


def test_folders_that_are_no_data(tmp_path):
    def finding(folder: Path, *words: str) -> None:
        with pytest.raises(UserError) as caught:
            find_scenes(folder)
        check_sentence(caught.value)
        assert all(word in str(caught.value) for word in words), caught.value

    finding(tmp_path / "nowhere", "nowhere does not exist")
    finding(tmp_path, "is empty")
    (tmp_path / "file").write_text("x")
    finding(tmp_path, "holds no scene")
    finding(tmp_path / "file", "is a file")
    expect(tmp_path / "nowhere", "does not exist")
    write_images(tmp_path / "photos")
    assert find_scenes(tmp_path) == [tmp_path / "photos"]  # so that somebody says what it lacks
    expect(tmp_path / "photos", "no camera poses", "transforms.json")


def test_bad_images(tmp_path):
    write_nerfstudio(tmp_path)
    image = tmp_path / "images" / "02.png"
    whole = image.read_bytes()
    image.write_bytes(b"")
    expect(tmp_path, "02.png", "empty (zero bytes)")
    image.write_text("no image")
    expect(tmp_path, "02.png", "cannot be read", "copy it again")
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(image)
    expect(tmp_path, "02.png is 25x18", "24x18", "frame 2")
    image.write_bytes(whole[: len(whole) // 2])  # the header is whole, so only decoding shows it
    assert len(read_scene(tmp_path)) == VIEWS
    with pytest.raises(UserError, match=r"02\.png cannot be read"):
        load_image(image)
    image.unlink()
    image.mkdir()
    expect(tmp_path, "02.png", "missing")


def test_images_of_two_sizes(tmp_path):
    contents = {"camera_angle_x": 1.0, "frames": document()["frames"]}
    write_nerfstudio(tmp_path, contents)
    Image.new("RGB", (WIDTH, 2 * HEIGHT)).save(tmp_path / "images" / "03.png")
    expect(tmp_path, "03.png is 24x36", "00.png is 24x18", "one size")


def test_bad_depth(tmp_path):
    write_depth(tmp_path)
    write_nerfstudio(tmp_path, document(depth=True))
    file = tmp_path / "depth" / "01.png"
    Image.fromarray(np.zeros((HEIGHT, WIDTH), dtype=np.uint8)).save(file)
    with pytest.raises(UserError, match="not 16-bit grey"):
        load_depth(file, 0.001)
    Image.fromarray(np.zeros((9, 12), dtype=np.uint16)).save(file)
    expect(tmp_path, "depth/01.png", "another size")
    file.unlink()
    expect(tmp_path, "depth/01.png", "does not exist")


def test_bad_colmap_models(tmp_path):
    model = write_colmap(tmp_path) / "sparse" / "0"
    whole = {file.name: file.read_bytes() for file in model.iterdir()}
    for name, data in whole.items():
        for part in (data[:-5], data + b"\0", b""):
            (model / name).write_bytes(part)
            expect(tmp_path, name, "cut short or damaged")
        (model / name).write_bytes(data)
    (model / "cameras.bin").write_bytes(struct.pack("<QIiQQ8d", 1, 7, 5, WIDTH, HEIGHT, 20, 20, 12, 9, *4 * [0]))
    expect(tmp_path, "'OPENCV_FISHEYE' is not one of", "undistort")
    (model / "cameras.bin").write_bytes(struct.pack("<QIiQQ4d", 1, 7, 2, WIDTH, HEIGHT, 20, 12, 9, math.nan))
    expect(tmp_path, "distortion nan", "undistort")
    (model / "cameras.bin").write_bytes(struct.pack("<QIiQQ4d", 1, 8, 1, WIDTH, HEIGHT, 20, 20, 12, 9))
    expect(tmp_path, "'00.png' uses camera 7")
    (model / "cameras.bin").write_bytes(whole["cameras.bin"])
    (model / "images.bin").write_bytes(struct.pack("<Q", 0))
    expect(tmp_path, "no images", "no poses")
    (model / "images.bin").unlink()
    expect(tmp_path, "no images.bin or images.txt")
    (model / "images.bin").write_bytes(whole["images.bin"])
    (tmp_path / "images" / "03.png").unlink()
    expect(tmp_path, "03.png", "does not exist")


def test_points_of_another_world(tmp_path):
    contents = document()
    for frame in contents["frames"]:
        frame["transform_matrix"][0][3] += 0.1
    expect(write_colmap(write_nerfstudio(tmp_path, contents)), "'00.png' differently", "one reconstruction")


# --- Fuzz: whatever a file holds, a scene or one sentence comes out ---

JUNK = [
    None,
    True,
    -1,
    0,
    1e308,
    10**400,
    math.nan,
    -math.inf,
    "",
    "x",
    "\ud800\n",
    "a" * 5000,
    [],
    {},
    [[]],
    [1.5],
]


def mutate_json(value: object, rng: random.Random) -> object:
    """Replace, remove or repeat something somewhere inside."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        match rng.randrange(6):
            case 0:
                value.pop(key)
            case 1 if isinstance(value, list):
                value.append(value[key])
            case _:
                value[key] = mutate_json(value[key], rng)
        return value
    return rng.choice(JUNK)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    match rng.randrange(4):
        case 0:
            return bytes(data[: rng.randrange(len(data))])
        case 1:
            at = rng.randrange(len(data))
            return bytes(data[:at] + rng.randbytes(rng.randrange(9)) + data[at:])
        case _:
            near = min(len(data), rng.choice([80, len(data)]))
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(near)] = rng.choice([0, 255, rng.randrange(256)])
            return bytes(data)


def survives(folder: Path) -> bool:
    """True if a scene came out, and then a sound one; False after one sentence."""
    try:
        scene = read_scene(folder)
        images = [scene.image(view) for view in range(len(scene))]
    except UserError as error:
        check_sentence(error)
        return False
    assert all(image.shape == (scene.cameras.height, scene.cameras.width, 3) for image in images)
    assert torch.isfinite(scene.cameras.world_from_cam).all() and torch.isfinite(scene.cameras.intrinsics).all()
    assert (scene.cameras.intrinsics[:, [0, 1], [0, 1]] > 0).all()
    assert all(pose_problem(pose) is None for pose in scene.cameras.world_from_cam)
    if scene.points is not None:
        assert torch.isfinite(scene.points).all()
        assert all(scene.seen_by(view).shape == (len(scene.points),) for view in range(len(scene)))
    return True


def test_fuzzed_json(tmp_path):
    write_depth(tmp_path)
    write_nerfstudio(tmp_path)
    rng = random.Random(0)
    survived = 0
    for _ in range(300):
        contents = document(depth=True)
        for _ in range(rng.randrange(1, 3)):
            mutate_json(contents, rng)
        (tmp_path / "transforms.json").write_text(json.dumps(contents))
        survived += survives(tmp_path)
    assert 0 < survived < 300


@pytest.mark.parametrize("binary", [True, False])
def test_fuzzed_bytes(tmp_path, binary):
    folder = write_colmap(tmp_path, binary)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in NAMES[1:])
    rng = random.Random(1)
    survived = 0
    for _ in range(200):
        file = rng.choice(files)
        whole = file.read_bytes()
        file.write_bytes(mutate_bytes(whole, rng))
        survived += survives(folder)
        file.write_bytes(whole)
    assert 0 < survived < 200


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_fuzzed_images(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    save_turned(file, 6)
    whole = file.read_bytes()
    rng = random.Random(2)
    for _ in range(100):
        file.write_bytes(mutate_bytes(whole, rng))
        try:
            assert load_image(file).shape[-1] == 3
        except UserError as error:
            check_sentence(error)
