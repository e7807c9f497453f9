"""Readers against scenes that the tests write themselves, against pycolmap, and against damaged input."""

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

from fvgen.data.scenes import Scene, find_scenes, load_depth, load_image, read_scene
from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, from_opengl, look_at, project

VIEWS, HEIGHT, WIDTH = 4, 18, 24
NAMES = [f"{i:02d}.png" for i in range(VIEWS)]
FOCAL, CENTER = (20.0, 21.0), (11.5, 9.5)


def world() -> tuple[Cameras, torch.Tensor, torch.Tensor]:
    """Cameras on an arc, points around the origin, and in which views each point was found [N, V]."""
    angle = torch.linspace(-0.4, 0.4, VIEWS, dtype=torch.float64)
    position = torch.stack([4 * angle.sin(), 0.3 * angle, -4 * angle.cos()], dim=-1)
    poses = look_at(position, torch.zeros_like(position), position.new_tensor([0.0, -1.0, 0.0]))
    intrinsics = torch.tensor(
        [[FOCAL[0], 0, CENTER[0]], [0, FOCAL[1], CENTER[1]], [0, 0, 1]], dtype=torch.float64
    )
    points = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.5
    found = torch.rand(30, VIEWS, generator=torch.Generator().manual_seed(1)) < 0.6
    return Cameras(poses, intrinsics.expand(VIEWS, 3, 3).clone(), HEIGHT, WIDTH), points, found


def write_images(folder: Path, names: list[str] = NAMES) -> None:
    for i, name in enumerate(names):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)


def write_depth(folder: Path) -> None:
    (folder / "depth").mkdir()
    for i in range(VIEWS):
        Image.fromarray(np.full((HEIGHT, WIDTH), 4000 + i, dtype=np.uint16)).save(
            folder / "depth" / f"{i:02d}.png"
        )


def document(depth: bool = False) -> dict:
    poses = from_opengl(world()[0].world_from_cam).tolist()
    frames = [{"file_path": f"images/{name}", "transform_matrix": poses[i]} for i, name in enumerate(NAMES)]
    if depth:
        frames = [frame | {"depth_file_path": f"depth/{i:02d}.png"} for i, frame in enumerate(frames)]
    intrinsics = {
        "fl_x": FOCAL[0],
        "fl_y": FOCAL[1],
        "cx": CENTER[0],
        "cy": CENTER[1],
        "w": WIDTH,
        "h": HEIGHT,
    }
    return {"camera_model": "PINHOLE", **intrinsics, "k1": 0.0, "frames": frames}


def write_nerfstudio(folder: Path, contents: dict | None = None) -> Path:
    write_images(folder)
    (folder / "transforms.json").write_text(json.dumps(contents or document()))
    return folder


def quaternion(rotation: torch.Tensor) -> list[float]:
    """(w, x, y, z) of a rotation by less than a half turn, from its trace."""
    w = math.sqrt(max(0.0, 1 + rotation.trace().item())) / 2
    axis = torch.stack(
        [rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]
    )
    return [w, *(axis / (4 * w)).tolist()]


def write_colmap(folder: Path, binary: bool = True, order: tuple[int, ...] = (2, 0, 3, 1)) -> Path:
    """A PINHOLE model as COLMAP's documentation lays it out; images numbered from 10, in the given order."""
    if not (folder / "images").exists():
        write_images(folder)
    model = folder / "sparse" / "0"
    model.mkdir(parents=True)
    cameras, points, found = world()
    pose = cameras.cam_from_world
    pixels, _ = project(points, cameras)
    params = [*FOCAL, *CENTER]
    shots = [(10 + i, [*quaternion(pose[i, :3, :3]), *pose[i, :3, 3].tolist()], NAMES[i]) for i in order]
    tracks = [[(10 + int(v), int(n)) for v in found[n].nonzero()[:, 0]] for n in range(len(points))]
    colors = [(n, 2 * n, 255 - n) for n in range(len(points))]
    if binary:
        (model / "cameras.bin").write_bytes(struct.pack("<QIiQQ4d", 1, 7, 1, WIDTH, HEIGHT, *params))
        data = struct.pack("<Q", VIEWS)
        for number, values, name in shots:
            data += (
                struct.pack("<I7dI", number, *values, 7)
                + name.encode()
                + b"\0"
                + struct.pack("<Q", len(points))
            )
            for n, (x, y) in enumerate(pixels[number - 10].tolist()):
                data += struct.pack("<ddq", x, y, n + 1 if found[n, number - 10] else -1)
        (model / "images.bin").write_bytes(data)
        data = struct.pack("<Q", len(points))
        for n, (xyz, color, track) in enumerate(zip(points.tolist(), colors, tracks, strict=True)):
            data += struct.pack("<Q3d3BdQ", n + 1, *xyz, *color, 0.5, len(track))
            data += b"".join(struct.pack("<II", *seen) for seen in track)
        (model / "points3D.bin").write_bytes(data)
        return folder
    (model / "cameras.txt").write_text(
        f"# cameras\n7 PINHOLE {WIDTH} {HEIGHT} {' '.join(map(str, params))}\n"
    )
    lines = ["# images"]
    for number, values, name in shots:
        lines.append(f"{number} {' '.join(map(repr, values))} 7 {name}")
        seen = [
            f"{x} {y} {n + 1 if found[n, number - 10] else -1}"
            for n, (x, y) in enumerate(pixels[number - 10].tolist())
        ]
        lines.append("" if number == 12 else " ".join(seen))  # an image without keypoints has an empty line
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    lines = ["# points"]
    for n, (xyz, color, track) in enumerate(zip(points.tolist(), colors, tracks, strict=True)):
        seen = " ".join(f"{view} {key}" for view, key in track)
        lines.append(f"{n + 1} {' '.join(map(repr, xyz))} {' '.join(map(str, color))} 0.5 {seen}")
    (model / "points3D.txt").write_text("\n".join(lines) + "\n")
    return folder


def check_cameras(scene: Scene) -> None:
    cameras = world()[0]
    assert [path.name for path in scene.image_paths] == NAMES
    assert (scene.cameras.height, scene.cameras.width) == (HEIGHT, WIDTH)
    assert scene.cameras.world_from_cam.dtype == scene.cameras.intrinsics.dtype == torch.float32
    torch.testing.assert_close(
        scene.cameras.world_from_cam.double(), cameras.world_from_cam, atol=1e-6, rtol=0
    )
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
    with pytest.raises(UserError, match="did you mean 'colmap'"):
        read_scene(tmp_path, "colmpa")


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
        tuple(np.float32(point.xyz).tolist()): {
            views[model.images[e.image_id].name] for e in point.track.elements
        }
        for point in model.points3D.values()
    }
    assert ours == theirs


# --- Images ---


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "YCbCr", "RGBA", "LA", "I;16"])
def test_every_kind_of_pixel_becomes_rgb(tmp_path, mode):
    ramp = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (8, 1))
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(ramp).convert(mode)
    file = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
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


def save_turned(file: Path, orientation: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, exif=exif)
    return pixels


def test_exif_turn_is_applied(tmp_path):
    pixels = save_turned(tmp_path / "a.png", 6)
    assert np.array_equal(load_image(tmp_path / "a.png"), np.rot90(pixels, -1))


def test_exif_turn_in_a_scene(tmp_path):
    write_nerfstudio(tmp_path)
    for name in NAMES:  # stored lying down, the cameras were made for the upright image
        save_turned(tmp_path / "images" / name, 8, (HEIGHT, WIDTH))
    check_cameras(read_scene(tmp_path))
    save_turned(tmp_path / "images" / NAMES[1], 8)  # the camera was made for the pixels as stored
    expect(tmp_path, "01.png", "18x24", "24x18")
    save_turned(tmp_path / "images" / NAMES[1], 3)  # upside down: sizes cannot tell
    expect(tmp_path, "01.png", "EXIF orientation 3", "remove the tag")


# --- What the readers must refuse, in one sentence ---


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
    "distortion": (change(k1=0.1), "distortion k1", "undistort"),
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


def test_mirrored_pose(tmp_path):
    contents = document()
    for row in contents["frames"][1]["transform_matrix"][:3]:
        row[0] = -row[0]
    expect(write_nerfstudio(tmp_path, contents), "mirrored", "frame 1")


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"frames": ', "\x00", '{"a": 1e5', "null", "[1]", '"x"']
)
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
    (model / "cameras.bin").write_bytes(struct.pack("<QIiQQ4d", 1, 7, 2, WIDTH, HEIGHT, 20, 12, 9, 0.1))
    expect(tmp_path, "'SIMPLE_RADIAL' is no pinhole", "undistort")
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
        images = [load_image(path) for path in scene.image_paths]
    except UserError as error:
        check_sentence(error)
        return False
    assert all(image.shape == (scene.cameras.height, scene.cameras.width, 3) for image in images)
    assert (
        torch.isfinite(scene.cameras.world_from_cam).all() and torch.isfinite(scene.cameras.intrinsics).all()
    )
    assert (scene.cameras.intrinsics[:, [0, 1], [0, 1]] > 0).all()
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
    pixels, depth = project(scene.points, scene.cameras)
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
