"""Inputs that people really had: each is read right, or refused with the sentence that mends it. The kinds: data left
aside without a word, implausible numbers, a file's own statements, one door for pixels, messages, names, versions."""

from __future__ import annotations

import json
import re
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import refusal
from PIL import Image
from scene_files import (
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

from fvgen.geometry.conventions import from_opengl
from fvgen.geometry.trajectories import read_path
from fvgen.scenes.formats import read_scene, scene_format
from fvgen.scenes.scene import mask_beside

# --- a. Data left aside ---

APPLIED = torch.tensor([[0.0, 1, 0, 0.3], [1, 0, 0, -0.2], [0, 0, -1, 0.1], [0, 0, 0, 1]], dtype=torch.float64)


@pytest.mark.parametrize("place", ["colmap/sparse/0", "sparse/0"])
@pytest.mark.parametrize("renamed", [False, True])
def test_nerfstudios_own_layout(tmp_path, place, renamed):
    """COLMAP's world through applied_transform is that of transforms.json; so are the points."""
    write_colmap(tmp_path)
    if place != "sparse/0":
        (tmp_path / "colmap").mkdir()
        (tmp_path / "sparse").rename(tmp_path / "colmap" / "sparse")
    contents = document() | {"applied_transform": APPLIED[:3].tolist(), "ply_file_path": "sparse_pc.ply"}
    moved = APPLIED @ world()[0].world_from_cam
    for view, frame in enumerate(contents["frames"]):
        frame["transform_matrix"] = from_opengl(moved)[view].tolist()
        frame["colmap_im_id"] = 10 + view
        if renamed:
            (tmp_path / "images" / NAMES[view]).rename(tmp_path / "images" / f"frame_{view}.png")
            frame["file_path"] = f"images/frame_{view}.png"
    (tmp_path / "transforms.json").write_text(json.dumps(contents))
    scene = read_scene(tmp_path)
    true = world()[1] @ APPLIED[:3, :3].T + APPLIED[:3, 3]
    assert (scene.points - true).abs().max() < 1e-5
    assert len(scene.observations) == int(world()[2].sum())


def test_points_that_nobody_reads_are_said(tmp_path):
    write_nerfstudio(tmp_path, document() | {"ply_file_path": "sparse_pc.ply"})
    assert "sparse_pc.ply" in read_scene(tmp_path).notes[0]


def test_the_largest_model_is_read(tmp_path):
    write_colmap(tmp_path)
    (tmp_path / "sparse" / "0").rename(tmp_path / "sparse" / "1")
    write_colmap(tmp_path)
    images = tmp_path / "sparse" / "0" / "images.bin"
    data = images.read_bytes()
    images.write_bytes(struct.pack("<Q", 1) + data[8 : 8 + (len(data) - 8) // VIEWS])
    scene = read_scene(tmp_path)
    assert len(scene) == VIEWS and "1 is read, the largest model; 0 of" in scene.notes[0]


def test_masks_are_honoured_and_said(tmp_path, capsys):
    from fvgen.depth.maps import point_maps
    from fvgen.posing.sources import open_source

    contents = document(depth=True)
    write_depth(tmp_path)
    (tmp_path / "masks").mkdir()
    left = np.where(np.arange(WIDTH) < WIDTH // 2, 0, 255).astype(np.uint8)
    Image.fromarray(np.tile(left, (HEIGHT, 1))).save(tmp_path / "masks" / "0.png")
    contents["frames"][0]["mask_path"] = "masks/0.png"
    write_nerfstudio(tmp_path, contents)
    scene = open_source(tmp_path).scene
    assert "what the masks of 1 frames hide gives no points" in scene.notes[0]
    assert scene.notes[0] in capsys.readouterr().err
    first, second = point_maps(scene, [0, 1], HEIGHT, WIDTH).depth
    assert (first[:, : WIDTH // 2] == 0).all() and (first[:, WIDTH // 2 :] > 0).all() and (second > 0).all()
    Image.new("L", (3, 3)).save(tmp_path / "masks" / "0.png")
    assert "has another size than its image" in refusal(lambda: read_scene(tmp_path))


def hide_left(file: Path, factor: int = 1) -> None:
    """A mask, ``factor`` times as large as the photographs, that hides their left half."""
    file.parent.mkdir(parents=True, exist_ok=True)
    row = np.where(np.arange(factor * WIDTH) < factor * WIDTH // 2, 0, 255).astype(np.uint8)
    Image.fromarray(np.tile(row, (factor * HEIGHT, 1))).save(file)


@pytest.mark.parametrize("name", ["{}.png", "{stem}.png"])
def test_masks_beside_a_colmap_model(tmp_path, name):
    """COLMAP's own names, 00.png.png, and those of others, 00.png."""
    write_colmap(tmp_path)
    hide_left(tmp_path / "masks" / name.format(NAMES[1], stem=Path(NAMES[1]).stem))
    scene = read_scene(tmp_path)
    assert list(scene.masks) == [1] and "masks of 1 frames" in scene.notes[0]
    shown = scene.shown([0, 1], HEIGHT, WIDTH)
    assert shown[0].all() and not shown[1, :, : WIDTH // 2].any() and shown[1, :, WIDTH // 2 :].all()
    assert scene.shown([0, 2], HEIGHT, WIDTH) is None


def test_masks_of_other_names_are_said(tmp_path):
    write_colmap(tmp_path)
    hide_left(tmp_path / "masks" / "other.png")
    scene = read_scene(tmp_path)
    assert not scene.masks and "has the name of a photograph" in scene.notes[0]
    for name in (".", "..", "/", "", "no-ending"):  # whatever a damaged images.txt says is answered, here by nothing
        assert mask_beside(tmp_path, name) is None


@pytest.mark.parametrize(("place", "factor"), [("masks", 2), ("masks_2", 1)])
def test_masks_of_smaller_photographs(tmp_path, place, factor):
    """As large as the camera says, or beside them in a folder of their own."""
    contents = document() | {"w": 2 * WIDTH, "h": 2 * HEIGHT}
    contents |= {key: 2 * contents[key] for key in ("fl_x", "fl_y", "cx", "cy")}
    contents["frames"][0]["mask_path"] = "masks/0.png"
    write_nerfstudio(tmp_path, contents)
    (tmp_path / "images").rename(tmp_path / "images_2")
    hide_left(tmp_path / place / "0.png", factor)
    shown = read_scene(tmp_path).shown([0], HEIGHT, WIDTH)[0]
    assert not shown[:, : WIDTH // 2].any() and shown[:, WIDTH // 2 :].all()


def test_synthetic_splits_are_one_scene(tmp_path):
    cameras = from_opengl(world()[0].world_from_cam)
    for split, views in {"train": [0, 1], "val": [2], "test": [3]}.items():
        (tmp_path / split).mkdir()
        frames = []
        for number, view in enumerate(views):
            pixels = np.zeros((HEIGHT, WIDTH, 4), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"r_{number}.png")
            frames.append({"file_path": f"./{split}/r_{number}", "transform_matrix": cameras[view].tolist()})
        (tmp_path / f"transforms_{split}.json").write_text(json.dumps({"camera_angle_x": 1.0, "frames": frames}))
    scene = read_scene(tmp_path)
    assert scene_format(tmp_path) == "synthetic" and len(scene) == VIEWS
    assert (scene.cameras.world_from_cam - world()[0].world_from_cam).abs().max() < 1e-6
    assert (scene.image(0) == 255).all()  # what is transparent is white, as that data set means it
    assert "2 of transforms_train.json, 1 of transforms_val.json" in scene.notes[0]


def test_images_txt_of_single_lines(tmp_path):
    write_colmap(tmp_path, binary=False)
    file = tmp_path / "sparse" / "0" / "images.txt"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], *lines[1::2]]) + "\n")
    said = refusal(lambda: read_scene(tmp_path))
    assert "is an image where key points belong; leave an empty line after each image" in said
    file.write_text("\r\n".join(["\ufeff# images", *(x for line in lines[1::2] for x in (line, ""))]), encoding="utf-8")
    assert len(read_scene(tmp_path)) == VIEWS  # and lines may end as on Windows, after a byte-order mark


def test_a_camera_in_the_first_line_is_not_lost():
    from fvgen.geometry.conventions import from_realestate10k, to_realestate10k

    cameras = world()[0]
    text = to_realestate10k(cameras, [1, 2, 3, 4], "https://example.org/clip")
    assert len(from_realestate10k(text, HEIGHT, WIDTH)[0]) == VIEWS
    with pytest.raises(ValueError, match="line 1 is a camera where the clip's address belongs"):
        from_realestate10k(text.split("\n", 1)[1], HEIGHT, WIDTH)


def test_masks_are_no_photographs(tmp_path):
    from fvgen.scenes.readers.photographs import read_photographs

    folder = tmp_path / "photographs"
    write_images(folder, ["0.png", "1.png", "dynamic_mask_0.png"])
    assert [path.name for path in read_photographs(folder).image_paths] == ["0.png", "1.png"]


# --- b. Implausible numbers ---


@pytest.mark.parametrize("center", [(0, 0), (0.5, 0.5), (0.3, -0.2), (20.0, 21.0)])
def test_principal_points_that_are_none(tmp_path, center):
    write_nerfstudio(tmp_path, document() | dict(zip(("cx", "cy"), center, strict=True)))
    if center == (20.0, 21.0):  # a focal length
        assert "the principal point" in refusal(lambda: read_scene(tmp_path))
    else:
        assert "in pixels from the top left corner, about 12" in refusal(lambda: read_scene(tmp_path))


def test_focal_lengths_of_two_lenses(tmp_path):
    write_nerfstudio(tmp_path, document() | {"fl_y": 100.0})
    assert "do not suit one lens" in refusal(lambda: read_scene(tmp_path))


# --- c. A file's own statements ---


def test_a_path_of_nerfstudios_viewer_comes_back(tmp_path):
    """exported = scale * (transform @ pose) for positions, transform @ pose for rotations."""
    true, scale = world()[0].world_from_cam, 0.4
    exported = APPLIED @ true
    exported[:, :3, 3] *= scale
    views = [{"camera_to_world": pose.flatten().tolist(), "fov": 50} for pose in from_opengl(exported)]
    (tmp_path / "camera_path.json").write_text(json.dumps({"camera_type": "perspective", "camera_path": views}))
    transforms = tmp_path / "dataparser_transforms.json"
    transforms.write_text(json.dumps({"transform": APPLIED[:3].tolist(), "scale": scale}))
    back = read_path(tmp_path / "camera_path.json", HEIGHT, WIDTH, transforms)
    assert (back.world_from_cam - true).abs().max() < 1e-12
    transforms.write_text(json.dumps({"transform": APPLIED[:3].tolist(), "scale": 0}))
    said = refusal(lambda: read_path(tmp_path / "camera_path.json", HEIGHT, WIDTH, transforms))
    assert "holds scale 0" in said


@pytest.mark.parametrize("kind", ["fisheye", "equirectangular"])
def test_paths_that_are_not_perspective(tmp_path, kind):
    views = [{"camera_to_world": torch.eye(4).flatten().tolist(), "fov": 50}]
    (tmp_path / "p.json").write_text(json.dumps({"camera_type": kind, "camera_path": views}))
    assert f"camera_type '{kind}'" in refusal(lambda: read_path(tmp_path / "p.json", HEIGHT, WIDTH))


def test_photographs_that_colmap_took_as_they_are_stored(tmp_path):
    write_colmap(tmp_path)
    before, pixels = read_scene(tmp_path), read_scene(tmp_path).image(0).astype(int)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in NAMES:
        Image.fromarray(np.asarray(Image.open(tmp_path / "images" / name))).save(tmp_path / "images" / name, exif=exif)
    scene = read_scene(tmp_path)
    assert scene.as_stored == set(range(VIEWS))
    assert torch.equal(scene.cameras.world_from_cam, before.cameras.world_from_cam)
    assert (scene.image(0) == pixels).all()


def test_the_third_radial_term(tmp_path):
    """With k3 alone the inverse is known: pixels at radius r come from r (1 + k3 r^6)."""
    write_nerfstudio(tmp_path, document() | {"k3": 0.05})
    scene = read_scene(tmp_path)
    assert scene.lenses[0, 8] == 0.05 and scene.image(0).shape == (HEIGHT, WIDTH, 3)
    from fvgen.scenes.images import distorted

    ray = torch.tensor([0.6, -0.8], dtype=torch.float64) * 0.9
    lens = torch.tensor([0.0, 0, 0, 0, 0.05], dtype=torch.float64)
    torch.testing.assert_close(distorted(ray, lens), ray * (1 + 0.05 * 0.9**6))


@pytest.mark.parametrize("k4", [0.0, 0.1])
def test_colmaps_full_opencv(tmp_path, k4):
    file = write_colmap(tmp_path) / "sparse" / "0" / "cameras.bin"
    params = (20.0, 21.0, 12.0, 9.0, 0.02, -0.01, 0.0, 0.0, 0.01, k4, 0.0, 0.0)
    file.write_bytes(struct.pack("<QIiQQ12d", 1, 7, 6, WIDTH, HEIGHT, *params))
    if k4:
        assert "k4, k5 or k6" in refusal(lambda: read_scene(tmp_path))
    else:
        assert read_scene(tmp_path).lenses[0, 8] == 0.01


PATCHES = [(200, 60, 40), (40, 180, 60), (50, 70, 210), (230, 230, 230), (20, 20, 20), (128, 128, 128)]


def film(path: Path, images: np.ndarray, codec: str, **stream) -> None:
    """uint8 [F, H, W, 3] (or uint16, of which all bits count) as a film whose colours it states."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        out = container.add_stream(codec, rate=10)
        out.height, out.width = images.shape[1:3]
        out.pix_fmt = stream["pix_fmt"]
        out.options = stream["options"]
        context = out.codec_context
        context.color_trc, context.color_primaries, context.colorspace = stream["curve"]
        context.color_range = 1
        kind = "rgb48le" if images.dtype == np.uint16 else "rgb24"
        for image in images:
            frame = av.VideoFrame.from_ndarray(image, format=kind)
            frame = frame.reformat(format=stream["pix_fmt"], dst_colorspace=stream["curve"][2], dst_color_range=1)
            container.mux(out.encode(frame))
        container.mux(out.encode())


def patches(values: np.ndarray) -> np.ndarray:
    """[1, 96, 144, 3]: six patches of 48 pixels."""
    rows = values.reshape(2, 3, 3)
    return np.repeat(np.repeat(rows, 48, axis=0), 48, axis=1)[None]


def read_back(path: Path, folder: Path) -> np.ndarray:
    """[6, 3]: the patches' middles."""
    from fvgen.scenes.readers.photographs import extract_video

    (file,) = extract_video(path, folder, 1).image_paths
    image = np.asarray(Image.open(file)).astype(int)
    return np.stack([image[24 + 48 * r, 24 + 48 * c] for r in (0, 1) for c in (0, 1, 2)])


def test_colours_of_an_ordinary_film(tmp_path):
    values = np.array(PATCHES, dtype=np.uint8)
    options = {"pix_fmt": "yuv420p", "options": {"crf": "4"}, "curve": (1, 1, 1)}
    film(tmp_path / "film.mp4", np.repeat(patches(values), 3, axis=0), "libx264", **options)
    assert (
        np.abs(read_back(tmp_path / "film.mp4", tmp_path / "frames") - values).max() <= 4
    )  # two 8-bit roundings and x264


def test_colours_of_a_phones_film(tmp_path):
    """HLG, BT.2020, 10 bits, made here by the standard's forward formulas."""
    av = pytest.importorskip("av")
    if "libx265" not in av.codecs_available:
        pytest.skip("this PyAV has no encoder of HEVC")
    values = np.array(PATCHES) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    white = (np.exp((0.75 - 0.55991073) / 0.17883277) + 0.28466892) / 12
    light = linear @ to_2020.T * white
    high = 0.17883277 * np.log((12 * light - 0.28466892).clip(1e-6)) + 0.55991073
    coded = np.where(light <= 1 / 12, np.sqrt(3 * light), high)
    images = np.repeat(patches((coded * 65535).round().astype(np.uint16)), 3, axis=0)
    options = {"pix_fmt": "yuv420p10le", "options": {"x265-params": "crf=4:log-level=none"}, "curve": (18, 9, 9)}
    film(tmp_path / "hlg.mov", images, "libx265", **options)
    assert np.abs(read_back(tmp_path / "hlg.mov", tmp_path / "frames") - PATCHES).max() <= 12


def test_pixels_that_are_not_square(tmp_path):
    av = pytest.importorskip("av")
    from fvgen.scenes.readers.photographs import extract_video

    def write(name: str, shape: Fraction) -> Path:
        with av.open(str(tmp_path / name), "w") as container:
            out = container.add_stream("libx264", rate=10)
            out.height, out.width, out.pix_fmt = 48, 64, "yuv420p"
            out.codec_context.sample_aspect_ratio = shape
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), dtype=np.uint8), format="rgb24")
            container.mux([*out.encode(frame), *out.encode()])
        return tmp_path / name

    found = extract_video(write("old.mp4", Fraction(3, 2)), tmp_path / "frames", 1)
    assert (found.height, found.width) == (48, 96)
    wide = write("wide.mp4", Fraction(20, 1))
    assert "20 times as wide as high" in refusal(lambda: extract_video(wide, tmp_path / "more", 1))
    assert not (tmp_path / "more").exists()


# --- d. One door for pixels ---


def test_photographs_reach_a_pipeline_upright(tmp_path):
    from fvgen.pipelines.frames import as_frames, with_photographs
    from fvgen.scenes.images import load_image

    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "phone.jpg"
    Image.fromarray(pixels).save(file, exif=exif)
    true = torch.from_numpy(load_image(file)).movedim(-1, 0) / 255
    for given in (Image.open(file), file, str(file)):
        filled = with_photographs(torch.zeros(1, 2, 3, 16, 16), {0: given})
        torch.testing.assert_close(filled[0, 0], true)
        torch.testing.assert_close(as_frames([given])[0, 0], true)


def test_alpha_and_sixteen_bits_are_what_scenes_see(tmp_path):
    from fvgen.pipelines.frames import as_frames

    clear = Image.fromarray(np.zeros((8, 8, 4), dtype=np.uint8))
    assert (as_frames([clear]) == 1).all()  # laid on white
    deep = Image.fromarray(np.full((8, 8), 32896, dtype=np.uint16))
    assert torch.allclose(as_frames([deep]), torch.tensor(128 / 255))


# --- e. Messages ---


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n", "is a git-lfs pointer"),
        (b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
    ],
)
def test_files_that_are_no_weights(tmp_path, name, head, words):
    from fvgen.convert.weights_file import CheckpointFile

    (tmp_path / name).write_bytes(head)
    assert words in refusal(lambda: CheckpointFile(tmp_path / name))


def test_images_that_are_pointers(tmp_path):
    write_nerfstudio(tmp_path)
    (tmp_path / "images" / NAMES[0]).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refusal(lambda: read_scene(tmp_path))


def test_depth_as_numpy_arrays(tmp_path):
    contents = document()
    (tmp_path / "depth").mkdir()
    for view, frame in enumerate(contents["frames"]):
        values = np.full((HEIGHT, WIDTH), 1500.0 + view, dtype=np.float32)
        values[0, 0] = np.nan
        np.save(tmp_path / "depth" / f"{view}.npy", values)
        frame["depth_file_path"] = f"depth/{view}.npy"
    depth = read_scene(write_nerfstudio(tmp_path, contents)).depth(1)
    assert depth[0, 0] == 0 and torch.allclose(depth[1:], torch.tensor(1.501))
    np.save(tmp_path / "depth" / "0.npy", np.array([{"a": 1}]), allow_pickle=True)
    refusal(lambda: read_scene(tmp_path))
    contents["frames"][0]["depth_file_path"] = "depth/0.exr"
    assert "16-bit PNG or .npy" in refusal(lambda: read_scene(write_nerfstudio(tmp_path, contents)))


# --- f. Names ---


def test_names_as_windows_writes_them(tmp_path):
    contents = document()
    contents["frames"][0]["file_path"] = "images\\00.png"
    contents["frames"][1]["file_path"] = ".\\images\\01.png"
    write_images(tmp_path)
    (tmp_path / "transforms.json").write_text(json.dumps(contents), encoding="utf-8-sig")
    assert len(read_scene(tmp_path)) == VIEWS


@pytest.mark.parametrize("key", ["state_dict", "module", "model", None])
@pytest.mark.parametrize("prefix", ["", "_forward_module.", "module.", "_orig_mod.", "module._orig_mod."])
def test_checkpoints_whatever_wrapped_them(tmp_path, key, prefix):
    from fvgen.convert.weights_file import CheckpointFile

    state = {f"{prefix}model.diffusion_model.weight": torch.ones(2)}
    torch.save(state if key is None else {key: state}, tmp_path / "x.ckpt")
    assert CheckpointFile(tmp_path / "x.ckpt").shapes == {"model.diffusion_model.weight": (2,)}


# --- g. Versions ---


def test_the_floor_of_av_gives_right_colours():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    floors = re.findall(r'"av>=([\d.]+)', project)
    assert floors and all(float(floor) >= 17 for floor in floors)  # 15 and 16 take BT.601's matrix for every film


# --- All of them, mutated ---


def test_mutated_files_give_a_scene_or_a_sentence(tmp_path):
    """300 files with bytes of them changed, cut or doubled: nobody sees a traceback."""
    from fvgen.errors import UserError

    for name in ("colmap", "nerfstudio"):
        (tmp_path / name).mkdir()
    write_colmap(tmp_path / "colmap", binary=False)
    contents = document() | {"applied_transform": APPLIED[:3].tolist(), "ply_file_path": "a.ply"}
    write_nerfstudio(tmp_path / "nerfstudio", contents)
    write_colmap(tmp_path / "nerfstudio", binary=False)
    path = tmp_path / "path" / "camera_path.json"
    path.parent.mkdir()
    views = [{"camera_to_world": pose.flatten().tolist(), "fov": 50} for pose in world()[0].world_from_cam]
    path.write_text(json.dumps({"camera_type": "perspective", "camera_path": views}))
    (path.parent / "dataparser_transforms.json").write_text(
        json.dumps({"transform": APPLIED[:3].tolist(), "scale": 0.5})
    )
    files = [file for file in sorted(tmp_path.rglob("*")) if file.suffix in (".json", ".txt")]
    random = np.random.default_rng(0)
    refused = 0
    for number in range(300):
        file = files[number % len(files)]
        whole = file.read_bytes()
        data, place = bytearray(whole), int(random.integers(len(whole)))
        match number % 4:
            case 0:
                data[place] = int(random.integers(256))
            case 1:
                del data[place:]
            case 2:
                data[place:place] = data[place : place + 40]
            case 3:
                digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
                data[digits[place % len(digits)]] = ord(random.choice(list("-.e9[")))
        file.write_bytes(data)
        try:
            if file.parent == path.parent:
                read_path(path, HEIGHT, WIDTH, path.parent / "dataparser_transforms.json")
            else:
                read_scene(next(folder for folder in file.parents if folder.parent == tmp_path))
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        file.write_bytes(whole)
    assert 100 < refused < 300
