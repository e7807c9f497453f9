"""Real scenes to prepared clips: the split, what is written, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from scene_files import VIEWS, document, write_colmap, write_depth, write_nerfstudio

from fvgen.clips.from_scenes import prepare_scenes, read_scenes, split_scenes
from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras
from fvgen.scenes.formats import Scene, load_image
from fvgen.scenes.images import fit_image

SIZE = (3, 8, 12)  # frames, height, width


def named(name: str) -> Scene:
    cameras = Cameras(torch.eye(4)[None], torch.eye(3)[None], 4, 4)
    return Scene(name, (Path(name) / "0.png",), cameras)


@pytest.fixture
def data(tmp_path) -> Path:
    """Two scenes: one with depth maps, one with the points of a COLMAP model."""
    folder = tmp_path / "data"
    (folder / "a").mkdir(parents=True)
    write_depth(folder / "a")
    write_nerfstudio(folder / "a", document(depth=True))
    write_colmap(folder / "b")
    return folder


# --- Split ---


@pytest.mark.parametrize("count", range(2, 13))
def test_split_keeps_all_scenes_once_and_in_order(count):
    scenes = [named(f"s{i:02d}") for i in range(count)]
    train, held_out = split_scenes(scenes)
    assert sorted(scene.name for scene in train + held_out) == [scene.name for scene in scenes]
    assert [s.name for s in held_out] == [f"s{i:02d}" for i in range(1, count, 4)]
    assert len(train) >= len(held_out) >= 1 and [s.name for s in train] == sorted(s.name for s in train)


def test_split_of_scenes_that_share_a_name():
    """Two links to folders called alike: they are two scenes all the same."""
    train, held_out = split_scenes([named("same"), named("same")])
    assert len(train) == len(held_out) == 1 and train[0] is not held_out[0]


@pytest.mark.parametrize("scenes", [[], [named("only")]])
def test_too_few_scenes_to_split(scenes):
    with pytest.raises(UserError, match="give a folder with two or more"):
        split_scenes(scenes)


# --- Reading ---


def test_read_scenes_reads_all_below_a_folder(data):
    assert [scene.name for scene in read_scenes(data)] == ["a", "b"]
    assert [scene.name for scene in read_scenes(data / "b")] == ["b"]


def test_one_bad_scene_is_told_before_anything_is_done(data):
    (data / "c" / "images").mkdir(parents=True)
    with pytest.raises(UserError, match="has no camera poses"):
        read_scenes(data)


# --- Preparing ---


def test_prepared_clips_hold_the_photographs(data, tmp_path):
    scenes = read_scenes(data)
    clips = prepare_scenes(scenes, tmp_path / "out", 2, *SIZE)
    assert clips.names == ["a-00", "a-01", "b-00", "b-01"]
    assert (clips.frames, clips.height, clips.width) == SIZE
    for index, clip in enumerate(clips):
        photos = [fit_image(load_image(path), *SIZE[1:]) for path in scenes[index // 2].image_paths]
        for frame in clip.truth:  # every frame is one of the scene's photographs, to the last bit
            assert sum(torch.equal(frame, photo) for photo in photos) == 1
        assert clip.known.tolist() == [True, False, True]
        assert torch.equal(clip.render[clip.known], clip.truth[clip.known])
        assert not torch.equal(clip.render[1], clip.truth[1])
        assert clip.render[1].max() > 0.1  # something of the cloud is in view
    assert not torch.equal(clips[0].truth, clips[1].truth)


def test_the_same_seed_gives_the_same_clips(data, tmp_path):
    scenes = read_scenes(data)
    first, again, other = (
        prepare_scenes(scenes, tmp_path / name, 2, *SIZE, seed=seed) for name, seed in (("x", 4), ("y", 4), ("z", 5))
    )
    assert all(
        torch.equal(a.render, b.render) and torch.equal(a.truth, b.truth) for a, b in zip(first, again, strict=True)
    )
    assert any(not torch.equal(a.truth, b.truth) for a, b in zip(first, other, strict=True))


def test_prepared_once_they_are_kept(data, tmp_path):
    scenes = read_scenes(data)
    first = prepare_scenes(scenes, tmp_path / "out", 1, *SIZE)[0]
    shutil.rmtree(data)  # nothing is left to read a second time
    assert torch.equal(prepare_scenes(scenes, tmp_path / "out", 1, *SIZE)[0].truth, first.truth)


def test_clips_of_other_scenes_or_settings_are_not_passed_off_as_these(data, tmp_path):
    scenes = read_scenes(data)
    prepare_scenes(scenes, tmp_path / "out", 1, *SIZE)
    for chosen, count, size, seed in (
        (scenes[:1], 1, SIZE, 0),
        (scenes[::-1], 1, SIZE, 0),
        (scenes, 2, SIZE, 0),
        (scenes, 1, (2, 8, 12), 0),
        (scenes, 1, (3, 8, 16), 0),
        (scenes, 1, SIZE, 1),
    ):
        with pytest.raises(UserError, match="other scenes or settings; delete it or choose another folder"):
            prepare_scenes(chosen, tmp_path / "out", count, *size, seed=seed)


def test_a_damaged_photograph_leaves_nothing_behind(data, tmp_path):
    scenes = read_scenes(data)
    for path in scenes[1].image_paths:
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="cannot be read") as caught:
        prepare_scenes(scenes, tmp_path / "out", 1, *SIZE)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_overwritten(data, tmp_path):
    with pytest.raises(UserError, match="something other than prepared clips"):
        prepare_scenes(read_scenes(data), data, 1, *SIZE)
    assert [scene.name for scene in read_scenes(data)] == ["a", "b"]


def test_more_frames_than_photographs(data, tmp_path):
    with pytest.raises(UserError, match="fewer frames"):
        prepare_scenes(read_scenes(data), tmp_path / "out", 1, VIEWS + 1, 8, 12)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["hololens_office", "fox"])
def test_a_real_scene(shared, tmp_path, name):
    """With depth maps and with triangulated points: what is seen of the cloud looks like the hidden photographs."""
    clips = prepare_scenes(read_scenes(shared / "data" / "scenes" / name), tmp_path / "out", 1, 5, 48, 64)
    clip = clips[0]
    unknown = ~clip.known
    truth, render = clip.truth[unknown], clip.render[unknown]
    seen = (render.amax(1) > 0.05) & (truth.amax(1) > 0.05)
    assert seen.float().mean() > (0.5 if name == "hololens_office" else 0.1)
    dots = render.movedim(1, -1)[seen]
    colors = truth.movedim(1, -1)[seen]
    assert torch.corrcoef(torch.stack([dots.flatten(), colors.flatten()]))[0, 1] > 0.5
    turned = truth.flip(-1).movedim(1, -1)[seen]  # mirrored photographs fit worse: it is no mere brightness
    assert (dots - colors).abs().mean() < 0.8 * (dots - turned).abs().mean()
