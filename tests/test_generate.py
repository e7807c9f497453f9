"""`fvgen generate`: what is written, that it repeats and resumes, what is refused, and the paths."""

from __future__ import annotations

import json
import math
import re
import shlex
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import refusal
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scene_files import document, world, write_depth, write_images, write_nerfstudio
from small_models import FRAMES, HEIGHT, WIDTH

import fvgen
from fvgen.cli import app
from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, look_at, pinhole, project
from fvgen.geometry.conventions import from_opengl
from fvgen.scenes.formats import read_scene
from fvgen.walks import run
from fvgen.walks.chain import joined, spans, walk_spans
from fvgen.walks.paths import camera_path
from fvgen.walks.render import judge_coverage, make_cloud, render_walk


@pytest.fixture(scope="module")
def scene_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four posed photographs with depth maps. Shared: never change it."""
    folder = tmp_path_factory.mktemp("scenes") / "räume hier"
    folder.mkdir()
    write_depth(folder)
    return write_nerfstudio(folder, document(depth=True))


@pytest.fixture(scope="module")
def options(teacher_folder: Path) -> dict:
    return {"model": teacher_folder, "steps": 2, "size": (HEIGHT, WIDTH)}


@pytest.fixture(scope="module")
def walked(scene_folder: Path, options: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fvgen.generate(scene_folder, tmp_path_factory.mktemp("walks") / "one", **options)


def test_all_is_written_and_read_back(walked, scene_folder):
    frames = 3 * (FRAMES - 1) + 1  # three clips between four photographs
    assert sorted(path.name for path in (walked / "frames").iterdir()) == [f"{n:05d}.png" for n in range(frames)]
    names = {path.name for path in walked.iterdir()}
    assert names >= {"video.mp4", "render.mp4", "points.ply", "transforms.json", "sparse", "run.json", "run.html"}
    assert "work" not in names
    import av

    for name in ("video.mp4", "render.mp4"):
        with av.open(str(walked / name)) as film:
            assert [frame.width for frame in film.decode(video=0)] == [WIDTH] * frames
    result = json.loads((walked / "run.json").read_text())["result"]
    assert result["known"] == {str(3 * view): f"given_{view:03d}.png" for view in range(4)}
    assert len(result["coverage"]) == frames and result["points"] == "depth"

    page = (walked / "run.html").read_text()
    assert "coverage" in page and page.count("<svg") >= 2 and "http" not in page.replace("http://www.w3.org", "")

    scene, given = read_scene(walked), read_scene(scene_folder).cameras.fitted(HEIGHT, WIDTH)
    assert len(scene) == 4 + frames - 4  # photographs on the path are not there twice
    order = {path.name: view for view, path in enumerate(scene.image_paths)}
    for view in range(4):
        pose = scene.cameras.world_from_cam[order[f"given_{view:03d}.png"]]
        assert (pose - given.world_from_cam[view]).abs().max() < 1e-5
    point, view = scene.observations.unbind(1)
    pixels, depth = project(scene.points, scene.cameras)
    assert len(point) >= len(scene.points) > 100 and (depth[view, point] > 0).all()
    inside = (pixels[view, point] >= 0) & (pixels[view, point] <= pixels.new_tensor([WIDTH, HEIGHT]))
    assert inside.all()


def test_other_programs_can_read_it(walked):
    pycolmap = pytest.importorskip("pycolmap")
    model = pycolmap.Reconstruction(walked / "sparse" / "0")
    assert model.num_reg_images() == 10
    for point in model.points3D.values():
        for seen in point.track.elements:
            image = model.images[seen.image_id]
            where = image.project_point(point.xyz)
            assert np.linalg.norm(where - image.points2D[seen.point2D_idx].xy) < 1
    # nerfstudio's and brush's fields
    contents = json.loads((walked / "transforms.json").read_text())
    assert (contents["camera_model"], contents["w"], contents["h"]) == ("OPENCV", WIDTH, HEIGHT)
    assert (walked / contents["ply_file_path"]).is_file()
    by_name = {image.name: image for image in model.images.values()}
    for frame in contents["frames"]:
        assert Image.open(walked / frame["file_path"]).size == (WIDTH, HEIGHT)
        image = by_name[Path(frame["file_path"]).name]
        pose = from_opengl(torch.tensor(frame["transform_matrix"], dtype=torch.float64))
        assert np.allclose(image.cam_from_world().inverse().matrix(), pose[:3].numpy(), atol=1e-9)
        params = [frame[key] for key in ("fl_x", "fl_y", "cx", "cy")]
        assert np.allclose(model.cameras[image.camera_id].params, params)
        assert frame["generated"] == image.name.startswith("frame_")
    ply = (walked / "points.ply").read_bytes()
    head, body = ply.split(b"end_header\n", 1)
    count = int(head.split(b"element vertex ")[1].split()[0])
    assert head.startswith(b"ply\nformat binary_little_endian 1.0\n") and len(body) == 15 * count


def test_the_same_call_repeats_bit_for_bit(walked, scene_folder, options, tmp_path):
    again = fvgen.generate(scene_folder, tmp_path / "again", **options)
    for name in ("run.json", "video.mp4", "render.mp4", "points.ply", "transforms.json", "sparse/0/points3D.txt"):
        assert (again / name).read_bytes() == (walked / name).read_bytes(), name


def test_a_stopped_run_resumes(walked, scene_folder, options, tmp_path, monkeypatch):
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fvgen.generate(scene_folder, tmp_path / "walk", **options, on_progress=stop)
    assert not (tmp_path / "walk" / "run.json").exists()
    made = []
    one = run.chain.__globals__["run_clip"]
    monkeypatch.setattr("fvgen.walks.chain.run_clip", lambda *given: made.append(1) or one(*given))
    fvgen.generate(scene_folder, tmp_path / "walk", **options)
    assert len(made) == 1  # of three clips two were there
    assert (tmp_path / "walk" / "run.json").read_bytes() == (walked / "run.json").read_bytes()
    lines: list[str] = []
    fvgen.generate(scene_folder, tmp_path / "walk", **options, told=lines.append)
    assert len(made) == 1 and lines == [f"{tmp_path / 'walk'} is complete"]
    with pytest.raises(UserError, match=r"another run \(seed differs\); choose another folder"):
        fvgen.generate(scene_folder, tmp_path / "walk", **options, seed=1)


# --- Bad input ---


def test_photographs_that_are_held_out_are_given_nowhere(scene_folder, options, tmp_path):
    out = fvgen.generate(scene_folder, tmp_path / "walk", **options, holdout=1, frames=3)
    given, held, all_ = (read_scene(folder) for folder in (out, out / "holdout", scene_folder))
    run = json.loads((out / "run.json").read_text())
    assert len(held.cameras) == 1 and list(run["result"]["given"]) == [f"given_{k:03d}.png" for k in range(3)]
    missing = [k for k, path in enumerate(all_.image_paths) if path.name not in run["result"]["given"].values()]
    torch.testing.assert_close(held.cameras.world_from_cam, all_.cameras.world_from_cam[missing], rtol=0, atol=1e-6)
    apart = (given.cameras.world_from_cam - held.cameras.world_from_cam).abs().amax(dim=(1, 2))
    assert apart[:3].min() > 1e-3
    for count, told in ((3, "leaves fewer than two"), (-1, "not possible")):
        assert told in refusal(lambda count=count: fvgen.generate(scene_folder, tmp_path / "no", holdout=count))


def photographs(folder: Path, count: int) -> list[Path]:
    write_images(folder, [f"{i:02d}.png" for i in range(count)])
    return sorted((folder / "images").iterdir())


def refused(tmp_path: Path, given: object, **changes: object) -> str:
    out = tmp_path / "out"
    said = refusal(lambda: fvgen.generate(given, out, **changes))
    assert ";" in said and not out.exists()  # what is wrong, and the cure
    return said


def test_photographs_that_will_not_do(tmp_path, monkeypatch):
    for name in ("FVGEN_DEPTH_PRO", "FVGEN_DOWNLOAD", "FVGEN_DUST3R", "FVGEN_DUST3R_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FVGEN_CACHE", str(tmp_path / "cache"))
    many = photographs(tmp_path / "many", 51)
    assert "51 photographs without poses are more than 50" in refused(tmp_path, many)
    assert "one photograph tells no depth" in refused(tmp_path, many[:1])
    assert "FVGEN_DEPTH_PRO" in refused(tmp_path, many[0])
    assert "does not exist" in refused(tmp_path, [many[0], tmp_path / "none.png"])
    same = tmp_path / "same.png"
    same.write_bytes(many[0].read_bytes())
    assert "are identical" in refused(tmp_path, [many[0], same])
    assert "share only" in refused(tmp_path, many[:2])  # noise
    assert "is no photograph; give one folder" in refused(tmp_path, [many[0], tmp_path / "many"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trajectory": "orbits"}, "did you mean 'orbit'"),
        ({"trajectory": "orbit:far"}, "write, for example, orbit:20 (degrees)"),
        ({"trajectory": "pan:180"}, "see nothing"),
        ({"frames": 1}, "--frames 1 is not possible"),
        ({"steps": 0}, "--steps 0 is not possible"),
        ({"views": 0}, "--views 0 is not possible"),
        ({"size": (18, 24)}, "use multiples of 8"),
        ({"seams": "glue"}, "known are cloud, overlap"),
        ({"model": "nobody"}, "nobody is no model folder"),
        ({"model": "nobody/nothing-of-this-name"}, "set FVGEN_DOWNLOAD=1 to allow its download"),
        ({"model": "src/nobody"}, "src/nobody is no model folder"),
        ({"device": "tpu9"}, "cannot be used here"),
        ({"frames": 3}, "cannot have 3 frames"),
    ],
)
def test_choices_that_cannot_be(scene_folder, options, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.delenv("FVGEN_DOWNLOAD", raising=False)
    assert words in refused(tmp_path, scene_folder, **options | changes)


def test_a_folder_that_holds_something_else_is_left_alone(scene_folder, options, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="something other than a run"):
        fvgen.generate(scene_folder, tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_says_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        app(["generate", str(tmp_path / "none.jpg"), "--out", str(tmp_path / "o")], standalone_mode=False)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("fvgen: ") and "Traceback" not in said


# --- Chains ---


@given(st.integers(2, 200), st.integers(2, 30), st.integers(1, 4))
def test_clips_cover_a_walk_and_share_frames(frames, clip, shared):
    shared = min(shared, clip - 1)
    found = spans(frames, clip, shared)
    assert found[0].start == 0 and found[-1].stop == frames
    assert all(span.stop - span.start == min(clip, frames) for span in found)
    overlaps = [a.stop - b.start for a, b in pairwise(found)]
    assert all(overlap >= shared for overlap in overlaps)
    assert len(found) == max(1, math.ceil((frames - shared) / (clip - shared)))


def test_five_views_and_fifty_six_frames_are_four_clips():
    cameras, _, _ = world()
    five = Cameras(
        torch.cat([cameras.world_from_cam, cameras.world_from_cam[:1]]),
        torch.cat([cameras.intrinsics, cameras.intrinsics[:1]]),
        cameras.height,
        cameras.width,
    )
    walk = camera_path("through", five, [0, 1, 2, 3, 4], None, 16, 4.0)
    assert len(walk.cameras) == 56 + 5
    known = torch.zeros(61, dtype=torch.bool)
    known[list(walk.known)] = True
    assert known.nonzero().flatten().tolist() == [0, 15, 30, 45, 60]
    assert [tuple(span) for span in walk_spans(known, 16, "overlap")] == [(0, 16), (15, 31), (30, 46), (45, 61)]
    for frame, view in walk.known.items():
        assert torch.equal(walk.cameras.world_from_cam[frame], five.world_from_cam[view])


def test_overlapping_clips_fade():
    first, second = torch.zeros(4, 3, 2, 2), torch.ones(4, 3, 2, 2)
    whole = joined(first, second, spans(5, 4, 3)[1], "overlap")
    assert whole[:, 0, 0, 0].tolist() == [0, 0, 0.5, 1, 1]
    assert joined(first, second, spans(7, 4)[1], "own_noise")[:, 0, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1]


# --- Paths and points ---


def test_paths_from_one_photograph_begin_there(scene_folder, tmp_path):
    scene = read_scene(scene_folder)
    (tmp_path / "walk.txt").write_text("0 10 20\n0 0 5\n0 0 0.1\n")
    for words in ("orbit", "orbit:-30", "spiral", "dolly:0.1", "pan", str(tmp_path / "walk.txt")):
        walk = camera_path(words, scene.cameras, [2, 0], 6, 6, 4.0)
        assert walk.known[0] == 2 and len(walk.cameras) == 6
        assert (
            walk.cameras.world_from_cam[-1] - walk.cameras.world_from_cam[0]
        ).abs().max() > 1e-3 or words == "spiral"


def test_coverage_is_told(scene_folder):
    scene = read_scene(scene_folder)
    cloud = make_cloud(scene, [0], HEIGHT, WIDTH)
    cameras = scene.cameras.fitted(HEIGHT, WIDTH)
    orbit = render_walk(cloud, camera_path("orbit:5", cameras, [0], 4, 4, cloud.typical))
    assert orbit.coverage.min() > 0.8 and judge_coverage(orbit) is None
    wide = render_walk(cloud, camera_path("pan:55", cameras, [0], 4, 4, cloud.typical))
    assert "see less than 30%" in judge_coverage(wide)


def test_the_short_way_from_python(scene_folder, teacher_folder):
    rendered = fvgen.open_scene(scene_folder).render("orbit:5", size=(HEIGHT, WIDTH), frames=4)
    assert rendered.frames.shape == (4, 3, HEIGHT, WIDTH) and rendered.known.tolist() == [True, False, False, False]
    video = fvgen.walk(scene_folder, "orbit:5", teacher_folder, steps=2, size=(HEIGHT, WIDTH))
    assert video.shape == (FRAMES, 3, HEIGHT, WIDTH) and video.min() >= 0 and video.max() <= 1


# --- Two photographs ---


def room() -> tuple[np.ndarray, torch.Tensor, Cameras]:
    """Two photographs [2, 240, 320, 3] of a built-in room, 60 cm apart, their depth, and the cameras."""
    from fvgen.clips.rooms import make_scene, render_scene, scene_generator

    position = torch.tensor([[-1.6, -0.9, 1.4], [-1.2, -1.25, 1.5]])
    target = torch.tensor([[0.8, 0.9, 1.0], [0.9, 0.8, 1.0]])
    cameras = Cameras(look_at(position, target, torch.tensor([0.0, 0.0, 1.0])), pinhole(2, 240, 320, 64), 240, 320)
    images, depth = render_scene(make_scene(scene_generator("test", 0, 3), "room"), cameras)
    return (images.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8), depth, cameras


def test_two_photographs_are_posed(tmp_path, monkeypatch):
    """A built-in room, whose poses are known: direction and turn within the noise of features, half a pixel."""
    pytest.importorskip("cv2")
    from fvgen.posing import two_views
    from fvgen.scenes.readers.photographs import photographs_of

    images, depth, cameras = room()
    files = []
    for view in range(2):
        files.append(tmp_path / f"{view}.png")
        Image.fromarray(images[view]).save(files[-1])
    assert two_views.focal_length(files[0], 240, 320) == two_views.USUAL_FOCAL * 320
    tagged = tmp_path / "tagged.jpg"
    exif = Image.Exif()
    exif.get_ifd(0x8769)[two_views.FOCAL_35MM] = 27
    Image.open(files[0]).save(tagged, exif=exif)
    assert two_views.focal_length(tagged, 240, 320) == pytest.approx(0.75 * 320)

    monkeypatch.setattr(two_views, "focal_length", lambda *given: cameras.intrinsics[0, 0, 0].item())
    scene = two_views.pose_pair(photographs_of(files, "room"), tmp_path / "posed")
    found = scene.cameras.cam_from_world[1].double()
    true = (cameras.cam_from_world[1] @ cameras.world_from_cam[0]).double()
    turn = math.degrees(math.acos(min(1.0, ((found[:3, :3].T @ true[:3, :3]).trace().item() - 1) / 2)))
    direction = torch.nn.functional.cosine_similarity(found[:3, 3], true[:3, 3], dim=0).item()
    assert turn < 1 and direction > math.cos(math.radians(5))
    # The unit is the distance of the cameras: depths times that are metres.
    point, view = scene.observations.unbind(1)
    pixels, z = project(scene.points, scene.cameras)
    here = view == 0
    x, y = pixels[0, point[here]].floor().long().unbind(-1)
    ratio = z[0, point[here]] * true[:3, 3].norm() / depth[0, y, x]
    assert 0.9 < ratio.median() < 1.1


@pytest.mark.slow
def test_real_pairs(shared, tmp_path, monkeypatch, teacher_folder):
    """Nine pairs without poses: at least seven give a video, the others say why."""
    pytest.importorskip("cv2")
    monkeypatch.setenv("FVGEN_CACHE", str(tmp_path / "cache"))
    videos = 0
    for pair in sorted((shared / "data" / "pairs").iterdir()):
        try:
            out = fvgen.generate(
                [pair / "0.jpg", pair / "1.jpg"], tmp_path / pair.name, teacher_folder, steps=1, size=(48, 64)
            )
            videos += (out / "video.mp4").is_file()
        except UserError as error:
            assert "share only" in str(error)
    assert videos >= 7


@pytest.mark.slow
def test_a_photograph_that_colmap_cannot_place_is_named(shared, tmp_path, monkeypatch):
    pytest.importorskip("pycolmap")
    monkeypatch.setenv("FVGEN_CACHE", str(tmp_path / "cache"))
    files = sorted((shared / "data" / "scenes" / "lund_door" / "images").iterdir())[:5]
    noise = np.random.default_rng(0).integers(0, 256, (768, 513, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    given = fvgen.open_scene([*files, tmp_path / "noise.png"]).given
    assert len(given.order) == 5 and list(given.left_out) == ["noise.png"] and given.left_out["noise.png"]
    assert [given.scene.image_paths[view].name for view in given.order] == [file.name for file in files]


# --- README ---


@pytest.mark.slow
def test_the_readmes_commands(tmp_path, monkeypatch):
    """As they stand, in a folder with two photographs of a built-in room."""
    pytest.importorskip("cv2")
    text = (Path(__file__).parents[1] / "README.md").read_text()
    section = text.split("## Photographs to a walk-through\n")[1].split("\n## ")[0]
    (commands,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "photographs").mkdir()
    images, _, _ = room()
    for name, image in zip(("one", "two"), images, strict=True):
        Image.fromarray(image).save(tmp_path / "photographs" / f"{name}.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FVGEN_CACHE", str(tmp_path / "cache"))
    for command in commands.splitlines():
        program, *words = shlex.split(command)
        assert program == "fvgen"
        app(words, standalone_mode=False)
    found = {}
    exec(code, found)
    assert found["rendered"].frames.shape == found["video"].shape == (8, 3, 48, 64)
    for folder in ("walk", "round"):
        assert (tmp_path / folder / "video.mp4").is_file() and (tmp_path / folder / "run.html").is_file()
    assert len(read_scene(tmp_path / "walk")) == 8
