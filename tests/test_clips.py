"""Prepared clips: what a clip may know, the way to disk and back, damage, and the cache of built-in scenes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fvgen.clips import builtin
from fvgen.clips.builtin import builtin_clips, cache_folder
from fvgen.clips.clip import Clip, render_clip
from fvgen.clips.folder import ClipFolder, save_clips
from fvgen.clips.rooms import depth_clip, synthetic_clip
from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, look_at, pinhole
from fvgen.geometry.pointcloud import render_points

FRAMES, HEIGHT, WIDTH = 4, 8, 12
STEP = 1 / 255


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_clip(name: str, seed: int) -> Clip:
    truth, render = torch.rand(2, FRAMES, 3, HEIGHT, WIDTH, generator=stream(seed))
    return Clip(name, truth, render, torch.tensor([True, False, False, True]))


def moving() -> tuple[Cameras, Tensor, Tensor]:
    """A camera that slides past a plane at depth 2: cameras, random photographs, exact depth."""
    position = torch.stack([torch.linspace(0, 0.5, FRAMES), torch.zeros(FRAMES), torch.zeros(FRAMES)], dim=-1)
    poses = look_at(position, position + torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0]))
    truth = torch.rand(FRAMES, 3, HEIGHT, WIDTH, generator=stream(3))
    return Cameras(poses, pinhole(FRAMES, HEIGHT, WIDTH, 70), HEIGHT, WIDTH), truth, torch.full_like(truth[:, 0], 2.0)


def damage(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


def same(a: Clip, b: Clip) -> bool:
    return a.name == b.name and all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("truth", "render", "known"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three random clips on disk."""
    save_clips(tmp_path / "clips", [random_clip(f"clip-{i}", i) for i in range(3)], {"kind": "random"})
    return tmp_path / "clips"


# --- What a clip is made of ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"truth": torch.rand(FRAMES, HEIGHT, WIDTH, 3)}, "truth is float32 [4, 8, 12, 3]"),
        ({"truth": torch.zeros(FRAMES, 3, HEIGHT, WIDTH, dtype=torch.uint8)}, "truth is uint8"),
        ({"render": torch.rand(FRAMES - 1, 3, HEIGHT, WIDTH)}, "render is float32 [3, 3, 8, 12]; give floats [4, 3"),
        ({"known": torch.ones(FRAMES)}, "known is float32 [4]; give bool [4]"),
        ({"known": torch.ones(2, dtype=torch.bool)}, "known is bool [2]"),
        ({"cameras": Cameras(torch.eye(4).repeat(4, 1, 1), pinhole(4, 8, 16, 70), 8, 16)}, "4 cameras of 8x16 for 4"),
        ({"cameras": Cameras(torch.eye(4).repeat(3, 1, 1), pinhole(3, 8, 12, 70), 8, 12)}, "3 cameras of 8x12 for 4"),
    ],
)
def test_a_clip_whose_parts_do_not_fit_is_refused(changes, said):
    parts = vars(random_clip("desk", 0)) | {"cameras": moving()[0]}
    Clip(**parts)
    with pytest.raises(UserError, match="clip desk: ") as caught:
        Clip(**(parts | changes))
    assert said in str(caught.value)


def test_known_frames_are_the_photographs_and_others_the_render():
    cameras, truth, _ = moving()
    points = torch.randn(200, 3, generator=stream(1)) + torch.tensor([0.0, 3.0, 0.0])
    colors = torch.rand(200, 3, generator=stream(2))
    clip, seen = render_clip("x", truth, cameras, points, colors, [0, 2], radius=0.3)
    image, visible, _ = render_points(points, colors, cameras, radius=0.3)
    assert clip.known.tolist() == [True, False, True, False] and visible[1].max() > 0.5
    assert torch.equal(clip.render[[0, 2]], truth[[0, 2]]) and torch.equal(seen, visible > 0)
    assert torch.equal(clip.render[[1, 3]], image.permute(0, 3, 1, 2)[[1, 3]])
    assert not torch.equal(clip.render[1], truth[1])
    assert clip.render.min() >= 0 and clip.render.max() <= 1


def test_unknown_frames_play_no_part_in_the_render():
    """The leak test: other photographs and depths between the ends change not one bit of the condition."""
    cameras, truth, depth = moving()
    clip = depth_clip("x", truth, depth, cameras, 0.3, 0.5, 0.01, stream())
    other_truth, other_depth = truth.clone(), depth.clone()
    other_truth[1:-1], other_depth[1:-1] = 0.123, 77.0
    other = depth_clip("x", other_truth, other_depth, cameras, 0.3, 0.5, 0.01, stream())
    assert torch.equal(clip.render, other.render) and not torch.equal(clip.truth, other.truth)


def test_the_ends_do_play_a_part():
    cameras, truth, depth = moving()
    clip = depth_clip("x", truth, depth, cameras, 0.3, 1.0, 0.0, stream())
    for end in (0, -1):
        changed = truth.clone()
        changed[end] = 0.5
        other = depth_clip("x", changed, depth, cameras, 0.3, 1.0, 0.0, stream())
        assert (other.render[1] - clip.render[1]).abs().max() > 0.05


def test_keep_is_the_share_of_points_that_survive():
    """Counted by dots that cannot overlap: one end's cloud, a radius below half a pixel, seen from where it was."""
    height, width = 60, 80
    camera = Cameras(torch.eye(4).repeat(2, 1, 1), pinhole(2, height, width, 70), height, width)
    camera.world_from_cam[1, 2, 3] = 100.0  # the last frame is beyond all points
    depth = torch.stack([torch.full((height, width), 2.0), torch.full((height, width), 1e-3)])
    cameras = camera[[0, 0, 1]]
    truth = torch.ones(3, 3, height, width)
    for keep in (0.0, 0.1, 0.5, 1.0):
        clip = depth_clip("x", truth, depth[[0, 0, 1]], cameras, 0.4 / (height / 2), keep, 0.0, stream(5))
        share = (clip.render[1] > 0.5).float().mean().item()
        assert share == pytest.approx(keep, abs=4 * (keep * (1 - keep) / (height * width)) ** 0.5)


def test_depth_noise_moves_points_and_its_stream_is_all_that_is_random():
    cameras, truth, depth = moving()
    clean, noisy, again, other = (
        depth_clip("x", truth, depth, cameras, 0.3, 0.7, noise, stream(seed)).render
        for noise, seed in ((0.0, 0), (0.05, 0), (0.05, 0), (0.05, 1))
    )
    assert torch.equal(noisy, again)
    assert not torch.equal(noisy[1], clean[1]) and not torch.equal(noisy[1], other[1])


# --- To disk and back ---


def test_round_trip_at_eight_bits(folder):
    clips = ClipFolder(folder)
    assert len(clips) == 3 and clips.names == ["clip-0", "clip-1", "clip-2"]
    assert (clips.frames, clips.height, clips.width) == (FRAMES, HEIGHT, WIDTH)
    assert clips.index["source"] == {"kind": "random"}
    for i, clip in enumerate(clips):
        expected = random_clip(f"clip-{i}", i)
        assert clip.name == expected.name and torch.equal(clip.known, expected.known)
        for found, wanted in ((clip.truth, expected.truth), (clip.render, expected.render)):
            assert (found - wanted).abs().max() <= STEP / 2 + 1e-6
            assert found.dtype == torch.float32 and found.min() >= 0 and found.max() <= 1
    assert same(clips[-1], clips[2])
    with pytest.raises(IndexError):
        clips[3]


def test_a_second_round_trip_changes_nothing(folder, tmp_path):
    clips = list(ClipFolder(folder))
    again = save_clips(tmp_path / "again", clips, {})
    assert all(same(a, b) for a, b in zip(clips, again, strict=True))


def test_values_out_of_range_are_clamped(tmp_path):
    truth = torch.tensor([-0.2, 0.0, 0.5, 1.0, 1.7]).reshape(1, 1, 1, 5).expand(2, 3, 1, 5).clone()
    found = save_clips(tmp_path / "x", [Clip("x", truth, truth, torch.tensor([True, True]))], {})[0].truth
    assert (found[0, 0, 0] * 255).tolist() == pytest.approx([0, 0, 128, 255, 255])


def test_clips_of_two_sizes_are_our_own_mistake(tmp_path):
    small = Clip("s", torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), torch.tensor([True, True]))
    with pytest.raises(AssertionError, match="one size"):
        save_clips(tmp_path / "x", [random_clip("a", 0), small], {})
    assert not (tmp_path / "x").exists()


# --- Whole or not at all ---


def test_a_failing_save_leaves_nothing(tmp_path):
    """The clips are written, their index cannot be: `source` is no JSON."""
    with pytest.raises(TypeError):
        save_clips(tmp_path / "new", [random_clip("a", 0)], {"bad": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_failing_save_keeps_the_old_clips(folder):
    with pytest.raises(TypeError):
        save_clips(folder, [random_clip("a", 9)], {"bad": object()})
    assert len(ClipFolder(folder)) == 3 and [path.name for path in folder.parent.iterdir()] == ["clips"]


def test_clips_replace_clips_and_nothing_else(folder, tmp_path):
    assert len(save_clips(folder, [random_clip("a", 9)], {})) == 1
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "precious.jpg").write_bytes(b"1")
    with pytest.raises(UserError, match="holds something other than prepared clips"):
        save_clips(tmp_path / "photos", [random_clip("a", 9)], {})
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["precious.jpg"]
    (tmp_path / "empty").mkdir()
    assert len(save_clips(tmp_path / "empty", [random_clip("a", 9)], {})) == 1


# --- Damage ---


def rewrite(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        change(index)
        (folder / "index.json").write_text(json.dumps(index))

    return apply


def without(key: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "clips.safetensors")
        del tensors[key]
        save_file(tensors, folder / "clips.safetensors")

    return apply


def reshaped(key: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "clips.safetensors")
        save_file({**tensors, key: tensors[key][:, 1:].contiguous()}, folder / "clips.safetensors")

    return apply


DAMAGE = {
    "no clips": lambda folder: (folder / "clips.safetensors").unlink(),
    "clips are a folder": lambda folder: (
        (folder / "clips.safetensors").unlink(),
        (folder / "clips.safetensors").mkdir(),
    ),
    "empty clips": lambda folder: damage(folder / "clips.safetensors", 0),
    "header cut": lambda folder: damage(folder / "clips.safetensors", 40),
    "pixels cut": lambda folder: damage(folder / "clips.safetensors", -1),
    "no truth": without("truth"),
    "no render": without("render"),
    "no known": without("known"),
    "other render": reshaped("render"),
    "other known": reshaped("known"),
    "no index": lambda folder: (folder / "index.json").unlink(),
    "index cut": lambda folder: damage(folder / "index.json", 30),
    "index is bytes": lambda folder: (folder / "index.json").write_bytes(b"\xff\xfe\x00"),
    "index is a list": lambda folder: (folder / "index.json").write_text("[1, 2]"),
    "other format": rewrite(lambda index: index.update(format=2)),
    "no names": rewrite(lambda index: index.update(names=[])),
    "names are no list": rewrite(lambda index: index.update(names="abc")),
    "a name too few": rewrite(lambda index: index["names"].pop()),
}


@pytest.mark.parametrize("case", sorted(DAMAGE))
def test_damage_is_told_in_a_sentence(folder, case):
    ClipFolder(folder)
    DAMAGE[case](folder)
    with pytest.raises(UserError) as caught:
        ClipFolder(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence and str(folder) in sentence and ("again" in sentence or "another" in sentence)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        ClipFolder(tmp_path / "missing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, not a folder"):
        ClipFolder(tmp_path / "file")
    with pytest.raises(UserError, match="no index of prepared clips"):
        ClipFolder(tmp_path)


# --- The built-in data set ---


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """The cache in a folder of this test, clips of 3 frames of 12 x 16."""
    monkeypatch.setenv("FVGEN_CACHE", str(tmp_path / "cache"))
    for name, value in (("FRAMES", 3), ("HEIGHT", 12), ("WIDTH", 16)):
        monkeypatch.setattr(builtin, name, value)
    return tmp_path / "cache"


def test_builtin_clips_are_made_once(small):
    clips = builtin_clips("test", 2)
    assert clips.path.parent == small and clips.names == ["test-0-00000", "test-0-00001"]
    expected = synthetic_clip("test", builtin.DATA_SEED, 1, 3, 12, 16)
    assert (clips[1].truth - expected.truth).abs().max() <= STEP / 2 + 1e-6
    assert (clips[1].render - expected.render).abs().max() <= STEP / 2 + 1e-6
    made = (clips.path / "clips.safetensors").stat()
    assert same(builtin_clips("test", 2)[1], clips[1])
    assert (clips.path / "clips.safetensors").stat() == made  # read, not made again


def test_more_builtin_clips_begin_with_the_same_ones_and_splits_differ(small):
    few, more, other = builtin_clips("train", 1), builtin_clips("train", 2), builtin_clips("test", 1)
    assert same(few[0], more[0])
    assert not set(more.names) & set(other.names) and not torch.equal(few[0].truth, other[0].truth)


def test_many_builtin_clips_are_made_by_several_processes(small):
    """The order is kept, and each process makes the very clips that this one would."""
    clips = builtin_clips("train", 9, workers=2)
    assert clips.names == [f"train-0-{i:05d}" for i in range(9)]
    alone = save_clips(small / "alone", [synthetic_clip("train", 0, i, 3, 12, 16) for i in range(9)], {})
    assert all(same(a, b) for a, b in zip(clips, alone, strict=True))


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for ours, theirs, expected in (
        (None, None, tmp_path / ".cache" / "fvgen"),
        (None, "/big/disk", "/big/disk/fvgen"),
        ("/mine", "/big/disk", "/mine"),
        ("", "", tmp_path / ".cache" / "fvgen"),
    ):
        for name, value in (("FVGEN_CACHE", ours), ("XDG_CACHE_HOME", theirs)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        assert cache_folder() == Path(expected)
