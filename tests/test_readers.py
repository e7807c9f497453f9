"""Published layouts, smaller image folders, lenses, RealEstate10K, folders of photographs, videos."""

from __future__ import annotations

import json
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scene_files import (
    CENTER,
    FOCAL,
    HEIGHT,
    NAMES,
    VIEWS,
    WIDTH,
    document,
    world,
    write_colmap,
    write_depth,
    write_images,
    write_nerfstudio,
)
from test_bad_scenes import check_sentence, mutate_bytes, survives

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.conventions import to_realestate10k
from fvgen.scenes.formats import read_scene
from fvgen.scenes.images import distorted
from fvgen.scenes.readers import photographs
from fvgen.scenes.readers.photographs import extract_video, read_photographs
from fvgen.system.packages import install


def expect(call, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    check_sentence(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


# --- images_2, images_4, images_8 ---


def shrink(folder: Path, factor: int, keep: bool = False) -> tuple[int, int]:
    """The photographs in images_N, with sizes rounded up as ImageMagick does; the big ones removed unless kept."""
    size = (-(-WIDTH // factor), -(-HEIGHT // factor))
    (folder / f"images_{factor}").mkdir()
    for name in NAMES:
        with Image.open(folder / "images" / name) as image:
            image.resize(size).save(folder / f"images_{factor}" / name)
        if not keep:
            (folder / "images" / name).unlink()
    return size


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("write", [write_colmap, write_nerfstudio])
def test_smaller_images(tmp_path, write, factor):
    """18 / 4 and 18 / 8 are no whole numbers: the cameras follow the sizes that the images have."""
    width, height = shrink(write(tmp_path), factor)
    scene = read_scene(tmp_path)
    assert scene.image_paths[0].parent.name == f"images_{factor}"
    assert (scene.cameras.height, scene.cameras.width) == scene.image(0).shape[:2] == (height, width)
    scale = torch.tensor([width / WIDTH, height / HEIGHT, 1]).diag()
    expected = scale @ torch.tensor([[FOCAL[0], 0, CENTER[0]], [0, FOCAL[1], CENTER[1]], [0, 0, 1.0]])
    torch.testing.assert_close(scene.cameras.intrinsics, expected.expand(VIEWS, 3, 3))
    torch.testing.assert_close(scene.cameras.world_from_cam.double(), world()[0].world_from_cam, atol=1e-6, rtol=0)


def test_smaller_images_on_demand(tmp_path):
    shrink(write_colmap(tmp_path), 2, keep=True)
    assert read_scene(tmp_path).cameras.width == WIDTH
    assert read_scene(tmp_path, images="images_2").cameras.width == WIDTH // 2
    expect(lambda: read_scene(tmp_path, images="images_4"), "images_4", "does not exist")
    expect(lambda: read_scene(tmp_path, images="images_3"), "unknown image folder 'images_3'")


def test_smaller_images_of_another_size(tmp_path):
    shrink(write_colmap(tmp_path), 2)
    for name in NAMES:
        Image.new("RGB", (10, 9)).save(tmp_path / "images_2" / name)
    expect(lambda: read_scene(tmp_path), "is 10x9 but its camera says 24x18")


def test_smaller_images_need_the_size_of_the_large_ones(tmp_path):
    contents = document()
    del contents["w"]
    shrink(write_nerfstudio(tmp_path, contents), 2)
    expect(lambda: read_scene(tmp_path), "w and h are missing", "frame 0")


def test_dl3dv_layouts(tmp_path):
    """480P: images_8 beside transforms.json; benchmark: in the sub-folder nerfstudio."""
    for folder in (tmp_path / "1a2b", tmp_path / "3c4d" / "nerfstudio"):
        folder.mkdir(parents=True)
        shrink(write_nerfstudio(folder, document() | {"camera_model": "OPENCV", "k1": 0.01, "k2": -0.002}), 8)
    for folder in (tmp_path / "1a2b", tmp_path / "3c4d"):
        scene = read_scene(folder)
        assert len(scene) == VIEWS and scene.name == folder.name and scene.cameras.width == 3
        assert scene.lenses is not None


# --- Lenses ---

LENS = (-0.15, 0.03, 0.004, -0.003)


def seen(rays: torch.Tensor) -> torch.Tensor:
    """[..., 3]: a smooth world at infinity, as 8-bit values."""
    x, y = rays.unbind(-1)
    return 127 + 100 * torch.stack([torch.sin(2 * x), torch.cos(3 * y), torch.sin(x + y)], dim=-1)


def photograph(size: tuple[int, int], lens: tuple, distortion: tuple) -> np.ndarray:
    """What a camera with a bent lens stores: each pixel's ray is found by bisection-free fixed-point iteration."""
    height, width = size
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    goal = (torch.stack([x, y], dim=-1).double() - torch.tensor(lens[2:])) / torch.tensor(lens[:2])
    rays = goal.clone()
    bend = torch.tensor(distortion, dtype=torch.float64)
    for _ in range(100):
        rays = rays + goal - distorted(rays, bend)
    assert (distorted(rays, bend) - goal).abs().max() < 1e-9
    return seen(rays).round().to(torch.uint8).numpy()


def test_the_lens_model_is_opencvs():
    """cv2.projectPoints, where it is installed."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV, the reference, is not installed")
    rays = np.random.default_rng(0).normal(size=(50, 2)) * 0.5
    points = np.concatenate([rays, np.ones((50, 1))], axis=1)
    theirs, _ = cv2.projectPoints(points, np.zeros(3), np.zeros(3), np.eye(3), np.array(LENS))
    ours = distorted(torch.from_numpy(rays), torch.tensor(LENS, dtype=torch.float64))
    torch.testing.assert_close(ours, torch.from_numpy(theirs[:, 0]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("distortion", [LENS, (0.08, 0.0, 0.0, 0.0)])
def test_distortion_is_undone(tmp_path, distortion):
    """What a pixel shows after reading is what the scene's pinhole camera sees there, up to the border."""
    size, lens = (90, 120), (100.0, 105.0, 58.0, 47.0)
    contents = document() | dict(zip(("k1", "k2", "p1", "p2"), distortion, strict=True))
    contents |= {"fl_x": lens[0], "fl_y": lens[1], "cx": lens[2], "cy": lens[3], "w": size[1], "h": size[0]}
    write_nerfstudio(tmp_path, contents)
    for name in NAMES:
        Image.fromarray(photograph(size, lens, distortion)).save(tmp_path / "images" / name)
    scene = read_scene(tmp_path)
    matrix = scene.cameras.intrinsics[1].double()
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    rays = (torch.stack([x, y], dim=-1).double() - matrix[:2, 2]) / matrix[[0, 1], [0, 1]]
    assert (torch.from_numpy(scene.image(1)).double() - seen(rays)).abs().max() <= 3
    zoom = matrix[0, 0].item() / lens[0]
    assert zoom == pytest.approx(1) if distortion == LENS else 1 < zoom < 1.1


def test_depth_maps_are_undistorted_without_mixing_depths(tmp_path):
    write_depth(tmp_path)
    write_nerfstudio(tmp_path, document(depth=True) | {"k1": -0.1})
    steps = np.where(np.arange(WIDTH) < WIDTH // 2, 1000, 3000).astype(np.uint16)
    Image.fromarray(np.tile(steps, (HEIGHT, 1))).save(tmp_path / "depth" / "01.png")
    depth = read_scene(tmp_path).depth(1)
    assert depth.unique().tolist() == pytest.approx([1, 3])


@pytest.mark.parametrize(
    ("number", "params", "lens"),
    [
        (2, (20.0, 12.0, 9.0, 0.02), (20, 20, 12, 9, 0.02, 0, 0, 0, 0)),
        (3, (20.0, 12.0, 9.0, 0.02, -0.01), (20, 20, 12, 9, 0.02, -0.01, 0, 0, 0)),
        (4, (20.0, 21.0, 12.0, 9.0, 0.02, -0.01, 1e-3, 2e-3), (20, 21, 12, 9, 0.02, -0.01, 1e-3, 2e-3, 0)),
    ],
)
def test_colmaps_lens_models(tmp_path, number, params, lens):
    file = write_colmap(tmp_path) / "sparse" / "0" / "cameras.bin"
    file.write_bytes(struct.pack(f"<QIiQQ{len(params)}d", 1, 7, number, WIDTH, HEIGHT, *params))
    scene = read_scene(tmp_path)
    torch.testing.assert_close(scene.lenses, torch.tensor([lens] * VIEWS, dtype=torch.float64))
    assert scene.image(0).shape == (HEIGHT, WIDTH, 3)


# --- RealEstate10K and ACID ---

TIMES = [1000, 34000, 67000, 100000]


def write_realestate10k(folder: Path, beside: bool = False) -> Path:
    """A clip folder with frames named by timestamp, and its camera file in it or beside it."""
    cameras = world()[0]
    folder.mkdir(parents=True)
    for i, time in enumerate(TIMES):
        pixels = np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{time}.png")
    text = to_realestate10k(cameras, TIMES, "https://www.youtube.com/watch?v=x")
    ((folder.parent if beside else folder) / f"{folder.name}.txt").write_text(text)
    return folder


@pytest.mark.parametrize("beside", [True, False])
def test_realestate10k(tmp_path, beside):
    scene = read_scene(write_realestate10k(tmp_path / "ünter wegs" / "0f47577ab3441480", beside))
    assert [path.stem for path in scene.image_paths] == list(map(str, TIMES))
    torch.testing.assert_close(scene.cameras.world_from_cam.double(), world()[0].world_from_cam, atol=1e-6, rtol=0)
    torch.testing.assert_close(scene.cameras.intrinsics.double(), world()[0].intrinsics, atol=1e-5, rtol=0)
    assert scene.points is None and scene.name == "0f47577ab3441480"


def test_realestate10k_frames_of_another_resolution(tmp_path):
    """Intrinsics are fractions of the size: they follow the frames."""
    folder = write_realestate10k(tmp_path / "clip")
    for time in TIMES:
        Image.new("RGB", (2 * WIDTH, 3 * HEIGHT)).save(folder / f"{time}.png")
    matrix = read_scene(folder).cameras.intrinsics[0]
    torch.testing.assert_close(matrix.diag(), torch.tensor([2 * FOCAL[0], 3 * FOCAL[1], 1.0]))


def test_realestate10k_without_some_frames(tmp_path):
    folder = write_realestate10k(tmp_path / "clip")
    (folder / f"{TIMES[1]}.png").unlink()
    Image.new("RGB", (5, 5)).save(folder / "999.png")  # in no line
    scene = read_scene(folder)
    assert [path.stem for path in scene.image_paths] == ["1000", "67000", "100000"]
    torch.testing.assert_close(
        scene.cameras.world_from_cam.double(), world()[0].world_from_cam[[0, 2, 3]], atol=1e-6, rtol=0
    )


def test_bad_realestate10k(tmp_path):
    folder = write_realestate10k(tmp_path / "clip")
    file = folder / "clip.txt"
    text = file.read_text()
    lines = text.splitlines()
    file.write_text("\n".join([*lines, lines[1]]))
    expect(lambda: read_scene(folder), "clip.txt", "timestamp 1000 twice")
    file.write_text(text.replace(lines[2].split()[7], "0.5", 1))
    expect(lambda: read_scene(folder), "timestamp 34000", "no rotation")
    file.write_text("\n".join([lines[0], lines[1] + " 7"]))
    expect(lambda: read_scene(folder), "clip.txt", "line 2 is not a timestamp and 18 numbers")
    file.write_text("")
    expect(lambda: read_scene(folder), "clip.txt", "lists no frames")
    file.write_text(text)
    expect(lambda: read_scene(folder, images="images_2"), "have no images_2")
    for time in TIMES:
        (folder / f"{time}.png").rename(folder / f"frame{time}.png")
    expect(lambda: read_scene(folder), "none of the 4 frames", "1000.png")
    file.unlink()
    expect(lambda: read_scene(folder, "realestate10k"), "no camera file clip.txt")


def test_published_camera_files_with_frames(shared, tmp_path):
    name = "2f25826f0d0ef09a"
    file = tmp_path / f"{name}.txt"
    file.write_bytes((shared / "data" / "re10k" / file.name).read_bytes())
    (tmp_path / name).mkdir()
    for line in file.read_text().splitlines()[1:]:
        Image.new("RGB", (64, 36)).save(tmp_path / name / f"{line.split()[0]}.jpg")
    assert len(read_scene(tmp_path / name)) == 16


def test_fuzzed_camera_files(tmp_path):
    folder = write_realestate10k(tmp_path / "clip")
    whole = (folder / "clip.txt").read_bytes()
    rng = random.Random(3)
    survived = 0
    for _ in range(200):
        (folder / "clip.txt").write_bytes(mutate_bytes(whole, rng))
        survived += survives(folder)
    assert 0 < survived < 200


@pytest.mark.parametrize(("model", "pinhole", "bends"), [(3, (20.0, 12.0, 9.0), 2), (4, (20.0, 21.0, 12.0, 9.0), 4)])
def test_fuzzed_lenses(tmp_path, model, pinhole, bends):
    """Whatever number stands for a lens: an image of the right size, or one sentence."""
    file = write_colmap(tmp_path) / "sparse" / "0" / "cameras.bin"
    rng = random.Random(model)
    survived = 0
    for _ in range(60):
        bent = [rng.choice([0, rng.gauss(0, 0.05), rng.gauss(0, 10), 1e300, float("nan")]) for _ in range(bends)]
        params = [*pinhole, *bent]
        file.write_bytes(struct.pack(f"<QIiQQ{len(params)}d", 1, 7, model, WIDTH, HEIGHT, *params))
        survived += survives(tmp_path)
    assert 0 < survived < 60


# --- Photographs without poses ---


def test_photographs(tmp_path):
    folder = tmp_path / "mein Haus"
    write_images(folder, ["10.png", "9.png", "img2.png"])
    (folder / "images" / "copy.png").write_bytes((folder / "images" / "9.png").read_bytes())
    (folder / "images" / "notes.txt").write_text("x")
    found = read_photographs(folder)
    assert [path.name for path in found.image_paths] == ["9.png", "10.png", "img2.png"]
    assert [path.name for path in found.duplicates] == ["copy.png"]
    assert (found.name, found.height, found.width, len(found)) == ("mein Haus", HEIGHT, WIDTH, 3)
    assert read_photographs(folder / "images").image_paths == found.image_paths


def test_photographs_that_cannot_be(tmp_path):
    expect(lambda: read_photographs(tmp_path / "nowhere"), "does not exist")
    expect(lambda: read_photographs(tmp_path), "holds no photographs")
    write_images(tmp_path, ["a.png", "b.png"])
    Image.new("RGB", (30, 30)).save(tmp_path / "images" / "b.png")
    expect(lambda: read_photographs(tmp_path), "b.png is 30x30, a.png is 24x18", "one size")
    (tmp_path / "images" / "b.png").write_bytes(b"")
    expect(lambda: read_photographs(tmp_path), "b.png is empty")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (3, 3)).save(tmp_path / "images" / name)
    expect(lambda: read_photographs(tmp_path), "a.png is 3x3", "too small")


def test_heic(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    pixels = np.full((32, 48, 3), 130, dtype=np.uint8)
    heif.from_pillow(Image.fromarray(pixels)).save(tmp_path / "a.heic", quality=90)
    assert read_photographs(tmp_path).width == 48


def test_heic_without_its_plug_in(tmp_path, monkeypatch):
    (tmp_path / "a.HEIC").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(50))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    expect(lambda: read_photographs(tmp_path), "a.HEIC is HEIC", install("photos"))


# --- Videos ---


def write_video(file: Path, frames: int = 12) -> None:
    """Each frame has a brightness of its own."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            pixels = np.full((48, 64, 3), 20 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def test_video(tmp_path):
    write_video(tmp_path / "ein video.mp4")
    found = extract_video(tmp_path / "ein video.mp4", tmp_path / "frames", 4)
    assert [path.name for path in found.image_paths] == ["000000.png", "000004.png", "000007.png", "000011.png"]
    levels = [np.asarray(Image.open(path)).mean() for path in found.image_paths]
    assert levels == pytest.approx([0, 80, 140, 220], abs=6)
    assert (found.height, found.width) == (48, 64)


@pytest.mark.parametrize("turn", [90, -90, 180])
def test_a_phones_video_is_turned_upright(tmp_path, turn):
    """The file says by which angle, counter-clockwise, a player turns it; the bright side tells where it went."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write a display rotation")
        stream.set_display_rotation(turn)
        pixels = np.zeros((48, 64, 3), dtype=np.uint8)
        pixels[:, :16] = 240  # left
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    found = extract_video(tmp_path / "a.mp4", tmp_path / "frames", 1)
    read = np.asarray(Image.open(found.image_paths[0])).astype(float)
    assert np.abs(read - np.rot90(pixels, turn // 90)).mean() < 12


def test_a_video_that_would_take_a_day(tmp_path, monkeypatch):
    """The bound at a smaller number: a film that reaches it takes minutes to write."""
    monkeypatch.setattr(photographs, "MOST_FRAMES", 11)
    write_video(tmp_path / "a.mp4")
    expect(lambda: extract_video(tmp_path / "a.mp4", tmp_path / "out", 4), "more than 11 frames")
    assert not (tmp_path / "out").exists()


def test_videos_that_cannot_be(tmp_path):
    file = tmp_path / "a.mp4"
    expect(lambda: extract_video(file, tmp_path / "out", 4), "does not exist")
    write_video(file)
    expect(lambda: extract_video(file, tmp_path, 4), "already there")
    expect(lambda: extract_video(file, tmp_path / "out", 40), "has 12 frames, not 40")
    expect(lambda: extract_video(file, tmp_path / "out", 0), "ask for one or more")
    file.write_bytes(b"no video at all")
    expect(lambda: extract_video(file, tmp_path / "out", 4), "a.mp4 cannot be decoded")
    file.write_bytes(b"")
    expect(lambda: extract_video(file, tmp_path / "out", 4), "a.mp4 cannot be decoded")
    assert not (tmp_path / "out").exists()


def test_video_without_a_decoder(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "av", None)
    expect(lambda: extract_video(tmp_path / "a.mp4", tmp_path / "out", 4), "needs PyAV", install("photos"))


def test_fuzzed_videos(tmp_path):
    pytest.importorskip("av", "18.1", reason="the FFmpeg in PyAV before 18.1 ends the process on damaged videos")
    write_video(tmp_path / "a.mp4", 6)
    whole = (tmp_path / "a.mp4").read_bytes()
    rng = random.Random(5)
    for number in range(60):
        (tmp_path / "a.mp4").write_bytes(mutate_bytes(whole, rng))
        try:
            assert len(extract_video(tmp_path / "a.mp4", tmp_path / str(number), 3)) >= 1
        except UserError as error:
            check_sentence(error)


def test_a_scene_below_a_path_with_spaces_and_umlauts(tmp_path):
    folder = tmp_path / "Größe é 中 x"
    folder.mkdir()
    assert len(read_scene(write_colmap(write_nerfstudio(folder)))) == VIEWS
    assert isinstance(read_scene(folder, "colmap").cameras, Cameras)
    assert json.loads((folder / "transforms.json").read_text())["w"] == WIDTH
