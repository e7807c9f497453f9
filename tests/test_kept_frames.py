"""Shards that keep their frames: the photographs to the bit, the cameras, and nothing else changed by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from checks import hashes, refusal
from PIL import Image
from safetensors import safe_open
from scene_files import HEIGHT, WIDTH

from fvgen.clips.folder import save_clips
from fvgen.geometry.cameras import project
from fvgen.geometry.pointcloud import point_radius, render_points, unproject
from fvgen.scenes.formats import read_scene
from fvgen.scenes.images import fit_depth, fit_image
from fvgen.shards.reader import ShardSet

FRAMES, SIZE = 3, (16, 24)  # of `make_shards`


@pytest.fixture(scope="module")
def kept(make_shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("kept") / "shards"
    assert make_shards(out, keep_frames=True).clips == 6
    return out


def test_clips_are_the_photographs_and_the_renders_of_the_known_ones(kept, shard_scenes):
    """Everything made again from the scene's files, by hand."""
    shards = ShardSet(kept)
    clips = shards.clips()
    assert isinstance(clips, Sequence) and len(clips) == 6 and clips.names == shards.names
    assert (clips.frames, clips.height, clips.width) == (FRAMES, *SIZE)
    for clip, record in zip(clips, shards.records, strict=True):
        scene = read_scene(shard_scenes / record.scene)
        views = [[path.name for path in scene.image_paths].index(name) for name in record.frames]
        truth = torch.stack([fit_image(scene.image(view), *SIZE) for view in views])
        assert clip.name == record.name and torch.equal(clip.truth, truth)  # to the bit: photographs have 8
        assert clip.known.tolist() == [True, False, True] and torch.equal(clip.render[clip.known], truth[clip.known])
        cameras = scene.cameras[views].fitted(*SIZE)
        assert torch.equal(clip.cameras.world_from_cam, cameras.world_from_cam)
        assert torch.equal(clip.cameras.cam_from_world, cameras.cam_from_world)
        assert torch.equal(clip.cameras.intrinsics, cameras.intrinsics)
        depth = torch.stack([fit_depth(scene.depth(views[end]), *SIZE) for end in (0, 2)])
        cloud = unproject(depth, truth[[0, 2]], cameras[[0, 2]], half_pixel_shift=True)  # as this teacher needs
        image = render_points(*cloud, cameras[[1]], radius=point_radius(*SIZE))[0][0].permute(2, 0, 1)
        assert (clip.render[1] - image).abs().max() <= 0.5 / 255 + 1e-6 and image.max() > 0.5


def test_pixels_and_cameras_belong_together(kept):
    """The cloud's points, coloured by the first photograph, project into it where it has their colour (to the corner of
    their pixels, for this teacher)."""
    shards = ShardSet(kept)
    for index, clip in enumerate(shards.clips()):
        stored = shards[index]
        pixels, _ = project(stored.cloud_points[:100], clip.cameras[[0]])
        x, y = pixels[0].round().long().unbind(-1)
        assert torch.equal((clip.truth[0][:, y, x].T * 255).round().byte(), stored.cloud_colors[:100])


def test_frames_change_nothing_else(kept, shards, make_shards, tmp_path):
    with_frames, without = ShardSet(kept), ShardSet(shards)
    assert with_frames.records == without.records
    for index in range(6):
        a, b = with_frames[index].tensors(), without[index].tensors()
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    plain = sorted(shards.glob("shard*"))[0]
    with safe_open(str(plain), framework="pt") as file:
        assert not {"truth", "render"} & set(file.keys()) and "keep_frames" not in file.metadata()["fvgen"]
    assert "keep_frames" not in (shards / "part-1-of-1.json").read_text()
    make_shards(tmp_path / "again", keep_frames=True)
    assert hashes(tmp_path / "again") == hashes(kept)


def test_masks_come_with_the_frames(make_shards, shard_scenes, shards, tmp_path):
    """In the shards that need them alone: the scene without masks has none, and both are one data set."""
    data = tmp_path / "data"
    for name in ("scene0", "scene1"):
        shutil.copytree(shard_scenes / name, data / name)
    contents = json.loads((data / "scene0" / "transforms.json").read_text())
    (data / "scene0" / "masks").mkdir()
    for number, frame in enumerate(contents["frames"]):
        pixels = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
        pixels[: 3 + number] = 0
        Image.fromarray(pixels).save(data / "scene0" / "masks" / f"{number}.png")
        frame["mask_path"] = f"masks/{number}.png"
    (data / "scene0" / "transforms.json").write_text(json.dumps(contents))
    make_shards(tmp_path / "out", data, keep_frames=True)
    found = ShardSet(tmp_path / "out")
    scene = read_scene(data / "scene0")
    for clip, record in zip(found.clips(), found.records, strict=True):
        if record.scene == "scene1":
            assert clip.shown is None
            continue
        views = [[path.name for path in scene.image_paths].index(name) for name in record.frames]
        expected = torch.stack([fit_depth(scene.shows(view), *SIZE) for view in views])
        assert torch.equal(clip.shown, expected) and not expected.all(dim=2).all()
    assert {record.scene for record in found.records} == {"scene0", "scene1"}
    assert found[0].condition.keys() == ShardSet(shards)[0].condition.keys()  # a mask is no condition
    folder = save_clips(tmp_path / "clips", list(found.clips()), {})
    assert torch.equal(folder[0].shown, found.clips()[0].shown) and folder[len(folder) - 1].shown.all()


def test_other_photographs_come_with_shards(make_shards, shard_scenes, tmp_path):
    """They are the scene's, not the clip's, and to the bit."""
    make_shards(tmp_path / "shards", keep_frames=True, others=1)
    shards = ShardSet(tmp_path / "shards", views=True)
    for clip, record in zip(shards.clips(), shards.records, strict=True):
        scene = read_scene(shard_scenes / record.scene)
        names = [path.name for path in scene.image_paths]
        pictures = torch.stack([fit_image(scene.image(view), *SIZE) for view in range(len(names))])
        (found,) = [view for view in range(len(names)) if torch.equal(pictures[view], clip.others.images[0])]
        assert names[found] not in record.frames
        assert torch.equal(clip.others.cameras.world_from_cam[0], scene.cameras.world_from_cam[found])
        assert torch.equal(clip.others.cameras.intrinsics, scene.cameras[[found]].fitted(*SIZE).intrinsics)
    assert torch.equal(
        save_clips(tmp_path / "clips", list(shards.clips()), {})[0].others.images, shards.clip(0).others.images
    )
    batch = shards.batch([0, 3])
    assert batch.views["images"].shape == (2, FRAMES + 1, 3, *SIZE) and batch.views["shown"].all()
    assert "no effect without --keep-frames" in refusal(lambda: make_shards(tmp_path / "none", others=1))
    # More than there are: every clip is dropped, and told.
    assert "too few other photographs nearby" in refusal(
        lambda: make_shards(tmp_path / "many", keep_frames=True, others=50)
    )


def test_shards_without_frames_say_how_to_get_some(shards, kept, make_shards):
    assert "prepare their scenes again with --keep-frames" in refusal(ShardSet(shards).clips)
    assert "other settings (keep_frames: False, not True)" in refusal(lambda: make_shards(shards, keep_frames=True))
    assert "other settings (keep_frames: True, not False)" in refusal(lambda: make_shards(kept))


def test_a_place_that_there_is_not(kept):
    clips = ShardSet(kept).clips()
    assert clips[-1].name == clips.names[5]
    with pytest.raises(IndexError):
        clips[6]
