"""Poses in the layouts of phones, LLFF and pixelSplat: the same world as in nerfstudio's, to the last digits."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import refusal
from PIL import Image
from scene_files import CENTER, FOCAL, HEIGHT, NAMES, VIEWS, WIDTH, world, write_images, write_nerfstudio

from fvgen.geometry.conventions import from_opengl
from fvgen.posing.chunks import chunk_scenes
from fvgen.posing.sources import find_sources, open_source
from fvgen.scenes.formats import read_scene, scene_format


def same_world(found, expected=None, center=CENTER) -> None:
    """Poses to float32's rounding of the stored numbers; focal lengths and principal points likewise."""
    expected = world()[0] if expected is None else expected
    torch.testing.assert_close(found.world_from_cam, expected.world_from_cam.float(), rtol=0, atol=2e-6)
    assert found.intrinsics[:, [0, 1], [0, 1]] == pytest.approx(np.array([FOCAL] * VIEWS), rel=1e-6)
    assert found.intrinsics[:, :2, 2] == pytest.approx(np.array([center] * VIEWS), rel=1e-6)


# --- Polycam ---


def write_polycam(folder: Path, kind: str = "", **changes: object) -> Path:
    """ARKit's matrices row by row, a file a photograph."""
    place = folder / "keyframes"
    write_images(place)
    (place / "images").rename(place / f"{kind}images")
    (place / f"{kind}cameras").mkdir()
    for name, pose in zip(NAMES, from_opengl(world()[0].world_from_cam), strict=True):
        entries = {f"t_{row}{column}": pose[row, column].item() for row in range(3) for column in range(4)}
        lens = {"fx": FOCAL[0], "fy": FOCAL[1], "cx": CENTER[0], "cy": CENTER[1], "width": WIDTH, "height": HEIGHT}
        file = place / f"{kind}cameras" / f"{Path(name).stem}.json"
        file.write_text(json.dumps(entries | lens | {"blur_score": 100.0} | changes))
    return folder


@pytest.mark.parametrize("kind", ["", "corrected_"])
def test_a_phones_own_poses_are_kept(tmp_path, kind):
    write_polycam(tmp_path, kind)
    assert scene_format(tmp_path) == "polycam"
    same_world(read_scene(tmp_path).cameras)
    assert open_source(tmp_path).format == "polycam"


def test_corrected_cameras_come_first_and_what_is_left_out_is_said(tmp_path):
    write_polycam(tmp_path, t_03=7.0)
    write_polycam(tmp_path, "corrected_")
    (tmp_path / "keyframes" / "corrected_cameras" / "00.json").unlink()
    (tmp_path / "keyframes" / "corrected_images" / "01.png").unlink()
    (tmp_path / "keyframes" / "depth").mkdir()
    scene = read_scene(tmp_path)
    assert [path.name for path in scene.image_paths] == NAMES[2:]
    assert [note.split(" ")[0] for note in scene.notes] == ["1", "1", "the"]
    assert scene.cameras.world_from_cam[:, 0, 3].abs().max() < 6  # not the other folder's 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"t_11": None}, "t_11 is None"),
        ({"t_11": 5.0}, "the pose"),
        ({"fx": True}, "fx is True"),
        ({"fx": 1e-3}, "focal length"),
        ({"width": WIDTH + 1}, "but its camera says"),
        ({"cx": "1"}, "cx is '1'"),
    ],
)
def test_cameras_of_a_phone_that_cannot_be(tmp_path, change, words):
    write_polycam(tmp_path, **change)
    assert words in refusal(lambda: read_scene(tmp_path))


def test_a_phones_cameras_without_photographs(tmp_path):
    write_polycam(tmp_path)
    for image in (tmp_path / "keyframes" / "images").iterdir():
        image.rename(image.with_stem("x" + image.stem))
    assert "none of the 4 cameras" in refusal(lambda: read_scene(tmp_path))


@pytest.mark.parametrize(("format", "words"), [("polycam", "has no keyframes/cameras"), ("llff", "poses_bounds.npy")])
def test_a_format_that_is_asked_for_and_is_not_there(tmp_path, format, words):
    write_nerfstudio(tmp_path)
    assert words in refusal(lambda: read_scene(tmp_path, format))


# --- LLFF ---


def write_llff(folder: Path, factor: int = 1, focal: float = FOCAL[0]) -> Path:
    """Rows of 17: columns down, right, backwards, position and (height, width, focal), then two depths."""
    write_images(folder)
    rows = []
    for pose in world()[0].world_from_cam:
        right, down, forward, position = pose[:3].T
        size = pose.new_tensor([factor * HEIGHT, factor * WIDTH, factor * focal])
        matrix = torch.stack([down, right, -forward, position, size], dim=1)
        rows.append([*matrix.flatten().tolist(), 2.0, 9.0])
    np.save(folder / "poses_bounds.npy", np.array(rows))
    if factor > 1:
        (folder / "images").rename(folder / f"images_{factor}")
    return folder


@pytest.mark.parametrize("factor", [1, 4])
def test_llffs_table(tmp_path, factor):
    scene = read_scene(write_llff(tmp_path, factor))
    assert scene_format(tmp_path) == "llff" and "are not used" in scene.notes[0]
    found = scene.cameras
    torch.testing.assert_close(found.world_from_cam, world()[0].world_from_cam.float(), rtol=0, atol=2e-6)
    assert found.intrinsics[:, [0, 1], [0, 1]] == pytest.approx(np.full((VIEWS, 2), FOCAL[0]), rel=1e-6)
    assert found.intrinsics[:, :2, 2] == pytest.approx(np.array([[WIDTH / 2, HEIGHT / 2]] * VIEWS), rel=1e-6)


def _pickled(folder: Path) -> None:
    np.save(folder / "poses_bounds.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


TABLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a photograph less": (lambda f: (f / "images" / NAMES[0]).unlink(), "has 4 rows and"),
    "no numbers": (lambda f: (f / "poses_bounds.npy").write_bytes(b"x"), "cannot be read"),
    "a pickle": (_pickled, "cannot be read"),
    "another shape": (lambda f: np.save(f / "poses_bounds.npy", np.zeros((4, 15))), "no table of 17"),
    "NaN": (lambda f: np.save(f / "poses_bounds.npy", np.full((4, 17), np.nan)), "no table of 17"),
    "zeros": (lambda f: np.save(f / "poses_bounds.npy", np.zeros((4, 17))), "the pose"),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_that_cannot_be(tmp_path, case):
    change, words = TABLES[case]
    change(write_llff(tmp_path))
    assert words in refusal(lambda: read_scene(tmp_path))


# --- pixelSplat's chunks ---


def entry(key: str = "0a1b") -> dict:
    """The world as one scene of a chunk; JPEG files as byte tensors."""
    cameras = world()[0]
    lens = torch.tensor([FOCAL[0] / WIDTH, FOCAL[1] / HEIGHT, CENTER[0] / WIDTH, CENTER[1] / HEIGHT, 0, 0])
    rows = torch.cat([lens.expand(VIEWS, 6).double(), cameras.cam_from_world[:, :3].reshape(VIEWS, 12)], dim=1)
    images = []
    for view in range(VIEWS):
        data = io.BytesIO()
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), 40 * view, dtype=np.uint8)).save(data, "JPEG")
        images.append(torch.frombuffer(bytearray(data.getvalue()), dtype=torch.uint8))
    stamps = torch.arange(VIEWS) * 33_000
    return {"key": key, "url": "https://example.org/v", "cameras": rows.float(), "timestamps": stamps, "images": images}


@pytest.fixture
def chunk(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FVGEN_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "test" / "000000.torch"
    file.parent.mkdir()
    torch.save([entry("0a1b"), entry("ff-2_c")], file)
    (file.parent / "index.json").write_text(json.dumps({"0a1b": file.name, "ff-2_c": file.name}))
    return file


def test_scenes_of_a_chunk(chunk):
    """By the folder, by the chunk, by a scene's own name; written out once."""
    found = find_sources([chunk.parent])
    assert [source.name for source in found] == ["0a1b", "ff-2_c"] and found == find_sources([chunk])
    assert find_sources([chunk / "0a1b"])[0].path == chunk / "0a1b"
    scene, format, _ = open_source(found[1].path)
    assert (scene.name, format, len(scene)) == ("ff-2_c", "realestate10k", VIEWS)
    torch.testing.assert_close(scene.cameras.world_from_cam, world()[0].world_from_cam.float(), rtol=0, atol=1e-5)
    assert scene.cameras.intrinsics[0, 0, 0] == pytest.approx(FOCAL[0], rel=1e-5)
    assert [int(scene.image(view).mean()) for view in range(VIEWS)] == pytest.approx([0, 40, 80, 120], abs=1)
    before = {path: path.stat().st_mtime_ns for path in (chunk.parents[1] / "cache").rglob("*")}
    open_source(found[1].path)
    assert before == {path: path.stat().st_mtime_ns for path in (chunk.parents[1] / "cache").rglob("*")}
    assert "holds 2 scenes; give one of them, such as" in refusal(lambda: open_source(chunk))
    assert "holds no scene 'x'" in refusal(lambda: open_source(chunk / "x"))


def test_a_chunk_is_data_like_any_other(chunk, tmp_path):
    from fvgen.reports.contact_sheet import inspect
    from fvgen.reports.data import kind_of

    assert kind_of(chunk.parent) == kind_of(chunk) == "scenes"
    write_nerfstudio(chunk.parent / "another")
    assert len(find_sources([chunk.parent])) == 3
    assert inspect(chunk / "0a1b", tmp_path / "page.html").is_file()
    for several in (chunk, chunk.parent):
        page = inspect(several, tmp_path / "page.html").read_text()
        assert f"is shown, the first of {2 if several == chunk else 3} scenes" in page


CHUNKS: dict[str, tuple[object, str]] = {
    "no list": ({"key": "a"}, "is no chunk of scenes"),
    "empty": ([], "is no chunk of scenes"),
    "a path for a key": ([entry("../x")], "which is no name"),
    "the same key twice": ([entry("a"), entry("a")], "twice"),
    "a number": ([7], "which is no name"),
}
SCENES: dict[str, tuple[dict, str]] = {
    "fewer columns": ({"cameras": torch.zeros(VIEWS, 17)}, "18 numbers"),
    "NaN": ({"cameras": torch.full((VIEWS, 18), float("nan"))}, "a"),
    "floats for stamps": ({"timestamps": torch.zeros(VIEWS)}, "timestamps"),
    "the same stamp": ({"timestamps": torch.zeros(VIEWS, dtype=torch.int64)}, "twice"),
    "an image less": ({"images": []}, "images are no list"),
    "pixels for bytes": ({"images": [torch.zeros(3, 4, 4)] * VIEWS}, "no file's bytes"),
    "noise for bytes": ({"images": [torch.zeros(9, dtype=torch.uint8)] * VIEWS}, "image"),
}


@pytest.mark.parametrize("case", CHUNKS)
def test_chunks_that_are_none(chunk, case):
    content, words = CHUNKS[case]
    torch.save(content, chunk)
    assert words in refusal(lambda: chunk_scenes(chunk))


@pytest.mark.parametrize("case", SCENES)
def test_scenes_of_a_chunk_that_cannot_be(chunk, case):
    change, words = SCENES[case]
    torch.save([entry() | change], chunk)
    assert words in refusal(lambda: open_source(chunk))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"<!DOCTYPE html><html>", "is a web page")],
)
def test_what_is_usually_saved_in_place_of_a_chunk(chunk, content, words):
    chunk.write_bytes(content)
    assert words in refusal(lambda: chunk_scenes(chunk))


def test_code_in_a_chunk_is_not_run(chunk):
    class Run:
        def __reduce__(self) -> tuple:
            return Path.touch, (chunk.with_name("ran"),)

    torch.save([entry() | {"url": Run()}], chunk)
    refusal(lambda: chunk_scenes(chunk))
    torch.save([entry()], chunk)
    whole = chunk.read_bytes()
    assert chunk_scenes(chunk) == [chunk / "0a1b"]
    chunk.write_bytes(whole[:2000])  # damaged after it was read: what is remembered is no longer true
    refusal(lambda: chunk_scenes(chunk))
    assert not chunk.with_name("ran").exists()
