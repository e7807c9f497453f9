"""Shards: the same bits however they are made, checked when they are read, in an order that nothing disturbs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import torch
from scene_files import document, write_depth, write_nerfstudio

from fvgen.data.order import ShardLoader, epoch_order
from fvgen.data.places import sha256_of
from fvgen.data.shards import ShardSet, holds_shards
from fvgen.errors import UserError
from fvgen.prepare import prepare
from fvgen.prepare_shard import Tally
from fvgen.presets import load_pipeline

FRAMES, SIZE, SCENES, CLIPS = 3, (16, 24), 3, 2
KEEP_ALL = {"points": 0.0, "overlap": 0.0, "sharpness": 0.0, "motion": 0.0}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Three small scenes with depth maps, in a folder with a space and an umlaut in its name."""
    folder = tmp_path_factory.mktemp("räume hier")
    for index in range(SCENES):
        scene = folder / f"scene{index}"
        scene.mkdir()
        write_depth(scene)
        write_nerfstudio(scene, document(depth=True))
    return folder


@pytest.fixture(scope="module")
def make(scenes, teacher_folder) -> Callable[..., Tally]:
    def call(out: Path, source: Path | None = None, **changes) -> Tally:
        options = {"clips_per_scene": CLIPS, "clips_per_shard": 2, "workers": 1, "limits": KEEP_ALL}
        options |= {"teacher": str(teacher_folder), **changes}
        return prepare([source or scenes], out, FRAMES, SIZE, **options)

    return call


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "whole"
    assert make(out).clips == SCENES * CLIPS
    return out


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir())}


def same_clip(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Writing ---


def test_a_clip_holds_what_the_teacher_makes_of_the_photographs(whole, teacher_folder, scenes):
    """Against the encoders themselves: the mean of the true frames' posterior, and the first photograph's tokens."""
    from fvgen.data.photos import fit_image
    from fvgen.data.scenes import read_scene
    from fvgen.pipeline import ViewCrafterPipeline

    pipeline, clips = load_pipeline(teacher_folder, ViewCrafterPipeline), ShardSet(whole)
    assert clips.names == [f"scene{s}-{n:02d}" for s in range(SCENES) for n in range(CLIPS)]
    for index, record in enumerate(clips.records):
        scene, clip = read_scene(scenes / record.scene), clips[index]
        views = [[path.name for path in scene.image_paths].index(name) for name in record.frames]
        truth = torch.stack([fit_image(scene.image(view), *SIZE) for view in views])
        noise = torch.randn(
            (FRAMES, *clip.latents.permute(1, 0, 2, 3).shape[1:]), generator=torch.Generator().manual_seed(record.seed)
        )
        assert torch.allclose(clip.latents, pipeline.encode_frames(truth[None], noise=noise)[0], atol=1e-6)
        with torch.no_grad():
            tokens = pipeline.image_tokens(truth[:1] * 2 - 1)[0]
        assert torch.allclose(clip.image_tokens, tokens, atol=1e-6)
        assert torch.equal(clip.text_tokens, pipeline.prompts.positive[0])
        assert clip.known.tolist() == [True, False, True]
        assert torch.equal(clip.world_from_cam, scene.cameras.world_from_cam[views])
        assert torch.equal(clip.intrinsics, scene.cameras[views].fitted(*SIZE).intrinsics)
        assert (record.points, record.format, record.stride) == ("depth", "nerfstudio", 1)


def test_the_same_bits_again_and_a_finished_run_is_left_alone(make, whole, tmp_path):
    make(tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(whole)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "again").glob("shard*")}
    make(tmp_path / "again")
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "again").glob("shard*")}
    make(tmp_path / "other", seed=1)
    assert hashes(tmp_path / "other") != hashes(whole)


def test_lost_and_damaged_shards_are_made_again(make, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    first, second, third = sorted(out.glob("shard*"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-10])
    flip(third, -5)
    (out / "shard-1-of-1-00000.safetensors.partial").write_bytes(b"half")
    make(out)
    assert hashes(out) == hashes(whole)


@pytest.mark.slow
def test_workers_do_not_change_a_bit(make, whole, tmp_path):
    make(tmp_path / "out", workers=2)
    assert hashes(tmp_path / "out") == hashes(whole)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_together_are_the_whole(make, whole, tmp_path, parts):
    out, one = tmp_path / "out", ShardSet(whole)
    for part in range(parts, 0, -1):
        make(out, part=(part, parts))
        if part > 1:
            assert f"lacks part 1 of {parts}" in refusal(lambda: ShardSet(out))
    many = ShardSet(out)
    assert many.names == one.names and many.records == one.records
    assert all(same_clip(many[i], one[i]) for i in range(len(one)))


def test_killed_again_and_again(whole, scenes, teacher_folder, make, tmp_path):
    """SIGKILL at ever later moments; then the same command to the end."""
    out = tmp_path / "out"
    words = ["fvgen.cli", "prepare", scenes, "--out", out, "--frames", FRAMES, "--size", "16x24", "--workers", 1]
    words += ["--clips-per-scene", CLIPS, "--clips-per-shard", 1, "--teacher", teacher_folder]
    straight = tmp_path / "straight"
    assert processes.run([straight if word is out else word for word in words], tmp_path).code == 0
    kills = 0
    for files in (1, 2, 4):  # the index of the part, then one shard after the other
        command = processes.Command(words, tmp_path)
        while command.running() and len(list(out.glob("*"))) <= files:
            time.sleep(0.002)
        kills += command.running()
        command.kill()
    assert kills
    last = processes.run(words, tmp_path)
    assert last.code == 0 and hashes(out) == hashes(straight), last.err
    assert f"{len(ShardSet(out))} clips" in last.out


def test_broken_inputs_are_skipped_and_listed(make, scenes, whole, tmp_path):
    source = tmp_path / "scenes"
    shutil.copytree(scenes, source)
    (source / "scene0" / "transforms.json").write_text("{")
    image = next(iter(sorted((source / "scene1" / "images").iterdir())))
    image.write_bytes(image.read_bytes()[:100])
    tally = make(tmp_path / "out", source)
    reasons = {entry.name: entry.reason for entry in tally.skipped}
    assert "transforms.json" in reasons["scene0"] and all(str(image) in reasons[n] for n in reasons if n != "scene0")
    assert len(reasons) > 1 and ShardSet(tmp_path / "out").skipped() == tally.skipped
    good, clips = ShardSet(whole), ShardSet(tmp_path / "out")
    assert {"scene2-00", "scene2-01"} <= set(clips.names) < set(good.names)
    for index, name in enumerate(clips.names):  # the others are what they would be without the broken ones
        assert same_clip(clips[index], good[good.names.index(name)])


def test_a_part_may_come_out_empty(make, scenes, whole, tmp_path):
    """Its scene cannot be read; the other parts of the array are a data set all the same."""
    source = tmp_path / "scenes"
    shutil.copytree(scenes, source)
    (source / "scene1" / "transforms.json").write_text("{")
    assert make(tmp_path / "out", source, part=(2, 3)).clips == 0
    for part in (1, 3):
        make(tmp_path / "out", source, part=(part, 3))
    clips, good = ShardSet(tmp_path / "out"), ShardSet(whole)
    assert clips.names == [name for name in good.names if not name.startswith("scene1")]
    assert [entry.name for entry in clips.skipped()] == ["scene1"]


def test_filters_count_what_they_drop(make, tmp_path):
    with pytest.raises(UserError, match="6 x static clip"):
        make(tmp_path / "b", limits=KEEP_ALL | {"motion": 1e6})
    assert not list((tmp_path / "b").glob("*"))
    more = make(tmp_path / "c", clips_per_scene=4)  # four photographs have two windows of three
    assert more.clips == SCENES * 2 and more.dropped == {"no further smooth path": SCENES * 2}
    assert ShardSet(tmp_path / "c").dropped() == dict(more.dropped)


# --- Reading ---


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0, 9, 300, -1])
def test_a_flipped_bit_is_detected_and_named(whole, tmp_path, place):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shard = sorted(out.glob("shard*"))[1]
    flip(shard, place)
    clips = ShardSet(out)
    assert clips[0].latents.isfinite().all()  # another shard is still good
    for read in (lambda: clips[2], clips.verify, lambda: clips.batch([0, 3])):
        assert shard.name in (said := refusal(read)) and "altered" in said


def test_a_truncated_or_missing_shard_is_named(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shard = sorted(out.glob("shard*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in (said := refusal(ShardSet(out).verify)) and "bytes instead of" in said
    shard.unlink()
    assert shard.name in (said := refusal(ShardSet(out).verify)) and "is missing" in said


def test_bad_folders_are_refused_in_one_sentence(whole, make, tmp_path):
    assert "does not exist" in refusal(lambda: ShardSet(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "holds no shards" in refusal(lambda: ShardSet(tmp_path / "empty")) and not holds_shards(tmp_path / "empty")
    index = json.loads((whole / "part-1-of-1.json").read_text())

    def altered(name: str = "part-1-of-1.json", **changes) -> str:
        out = tmp_path / "altered"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        (out / name).write_text(json.dumps(index | changes))
        return refusal(lambda: ShardSet(out))

    assert "unfinished" in altered(complete=False)
    assert "no index" in altered(format=9)
    assert "no index" in altered(shards=[index["shards"][0] | {"file": "../../etc/passwd"}])
    assert "no index" in altered("part-2-of-2.json")
    assert "mixes parts" in altered("part-2-of-2.json", part=2, parts=2)
    assert "no clip" in altered(shards=[])
    assert "other settings (seed" in refusal(lambda: make(whole, seed=3))
    assert "parts of 1, not of 2" in refusal(lambda: make(whole, part=(1, 2)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert "thesis.txt" in refusal(lambda: make(tmp_path / "mine"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"part": (3, 2)}, "part 3/2 does not exist"),
        ({"points": "dpeth"}, "did you mean 'depth'"),
        ({"known_views": 3}, "known views"),
        ({"limits": {"bluriness": 1.0}}, "unknown limit"),
        ({"teacher": "huge"}, "no model folder"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_settings_that_cannot_work(make, tmp_path, changes, said):
    assert said in refusal(lambda: make(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_remote_shards_are_read_only_where_that_is_allowed(whole, tmp_path, monkeypatch, capsys):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(whole), "/bucket/shards", recursive=True)
    monkeypatch.setenv("FVGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FVGEN_DOWNLOAD", raising=False)
    assert "FVGEN_DOWNLOAD=1" in refusal(lambda: ShardSet("memory://bucket/shards"))
    monkeypatch.setenv("FVGEN_DOWNLOAD", "1")
    clips, local = ShardSet("memory://bucket/shards"), ShardSet(whole)
    assert "memory://bucket/shards" in capsys.readouterr().err
    assert all(same_clip(clips[i], local[i]) for i in range(2)) and clips.names == local.names
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 1  # only what was needed
    name = sorted(whole.glob("shard*"))[1].name
    memory.pipe(f"/bucket/shards/{name}", (whole / name).read_bytes()[:-1])
    assert name in refusal(lambda: clips[2])
    assert "cannot be read" in refusal(lambda: ShardSet("unheard://bucket/shards"))


# --- Order ---


@pytest.mark.parametrize("window", [None, 1, 2])
def test_an_epoch_is_every_clip_once(window):
    shard_of = [n // 5 for n in range(23)]
    orders = [epoch_order(shard_of, seed, epoch, window).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == epoch_order(shard_of, 0, 0, window).tolist()
    if window:  # never more than so many shards at a time
        shards = [shard_of[clip] for clip in orders[0]]
        for first in range(0, 23, 1):
            left = {shard for shard in shards[:first] if shard in shards[first:]}
            assert len(left) <= window


def drawn(clips, steps: int, **options) -> list[list[str]]:
    """The clips of each step, told by their latents."""
    names = {clips[i].latents.sum().item(): name for i, name in enumerate(clips.names)}
    loader = iter(ShardLoader(clips, **options))
    return [[names[latents.sum().item()] for latents in next(loader).latents] for _ in range(steps)]


@pytest.mark.parametrize(("world", "batch"), [(1, 1), (2, 2), (3, 1), (4, 3)])
def test_all_ranks_together_see_one_sequence(whole, world, batch):
    clips = ShardSet(whole)
    line = [name for step in drawn(clips, 24, batch_size=1, seed=5) for name in step]
    steps = 24 // (world * batch)
    ranks = [drawn(clips, steps, batch_size=batch, seed=5, rank=r, world_size=world) for r in range(world)]
    woven = [ranks[r][step][k] for step in range(steps) for k in range(batch) for r in range(world)]
    assert woven == line
    assert sorted(line[:6]) == sorted(line[6:12]) == clips.names and line[:6] != line[6:12]


def test_a_loader_resumes_in_another_world_and_workers_change_nothing(whole):
    clips = ShardSet(whole)
    line = [name for step in drawn(clips, 20, batch_size=1, seed=2) for name in step]
    first = ShardLoader(clips, 2, seed=2, world_size=2)
    batches = iter(first)
    for _ in range(2):
        next(batches)
    state = json.loads(json.dumps(first.state_dict()))
    later = ShardLoader(clips, 3, seed=2, workers=1)
    later.load_state_dict(state)
    expected = clips.batch([clips.names.index(name) for name in line[8:11]])
    batch = next(iter(later))
    assert torch.equal(batch.latents, expected.latents) and torch.equal(
        batch.condition.context, expected.condition.context
    )
    assert later.state_dict()["consumed"] == 11
    with pytest.raises(ValueError, match="seed"):
        ShardLoader(clips, 1, seed=3).load_state_dict(state)


# --- Training ---


def test_a_stage_trains_on_shards(whole, stage):
    from fvgen.distill import read_metrics, run

    config = stage(data=str(whole))
    run(config)
    assert len(read_metrics(config.out)) == 3


def test_shards_of_another_teacher_are_refused(whole, stage, tmp_path):
    from small_models import small_teacher

    from fvgen.distill import run
    from fvgen.presets import save_model

    other = small_teacher()
    other.vae.encoder.conv_in.bias.data += 1
    save_model(other, tmp_path / "other")
    said = refusal(lambda: run(stage(data=str(whole), teacher=str(tmp_path / "other"))))
    assert "were encoded by teacher" in said and not Path(stage().out).exists()
