"""Shards: the same bits however they are made, checked when they are read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from checks import hashes, refusal

from fvgen.clips.filters import LIMITS
from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras, project
from fvgen.pipelines.folders import load_pipeline
from fvgen.shards.encoders import encoders
from fvgen.shards.reader import ShardSet

FRAMES, SIZE, SCENES, CLIPS = 3, (16, 24), 3, 2  # of the fixture `shards`


def same_clip(a, b) -> bool:
    a, b = a.tensors(), b.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- Writing ---


def test_a_clip_holds_what_the_teacher_makes_of_the_photographs(shards, teacher_folder, shard_scenes):
    """Against the encoders themselves: the mean of the true frames' posterior, and the first photograph's tokens."""
    from fvgen.models.viewcrafter.pipelines import ViewCrafterPipeline
    from fvgen.scenes.formats import read_scene
    from fvgen.scenes.images import fit_image

    pipeline, clips = load_pipeline(teacher_folder, ViewCrafterPipeline), ShardSet(shards)
    assert clips.names == [f"scene{s}-{n:02d}" for s in range(SCENES) for n in range(CLIPS)]
    for index, record in enumerate(clips.records):
        scene, clip = read_scene(shard_scenes / record.scene), clips[index]
        views = [[path.name for path in scene.image_paths].index(name) for name in record.frames]
        truth = torch.stack([fit_image(scene.image(view), *SIZE) for view in views])
        noise = torch.randn(
            (FRAMES, *clip.latents.permute(1, 0, 2, 3).shape[1:]), generator=torch.Generator().manual_seed(record.seed)
        )
        assert torch.allclose(clip.latents, pipeline.encode_frames(truth[None], noise=noise)[0], atol=1e-6)
        with torch.no_grad():
            tokens = pipeline.image_tokens(truth[:1] * 2 - 1)[0]
        assert torch.allclose(clip.condition["image_tokens"], tokens, atol=1e-6)
        assert torch.equal(clip.condition["text_tokens"], pipeline.prompts.positive[0])
        assert clip.known.tolist() == [True, False, True]
        assert torch.equal(clip.world_from_cam, scene.cameras.world_from_cam[views])
        assert torch.equal(clip.intrinsics, scene.cameras[views].fitted(*SIZE).intrinsics)
        assert (record.points, record.format, record.stride) == ("depth", "nerfstudio", 1)


def test_the_same_bits_again_and_a_finished_run_is_left_alone(make_shards, shards, tmp_path):
    make_shards(tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(shards)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "again").glob("shard*")}
    make_shards(tmp_path / "again")
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "again").glob("shard*")}
    make_shards(tmp_path / "other", seed=1)
    assert hashes(tmp_path / "other") != hashes(shards)


def test_the_network_is_not_read(make_shards, teacher_folder, shards, tmp_path):
    """Its weights, most of a teacher, encode nothing: by this process and by a worker the same shards come without."""
    shutil.copytree(teacher_folder, tmp_path / teacher_folder.name)
    for file in (tmp_path / teacher_folder.name / "unet").glob("*.safetensors"):
        file.unlink()
    make_shards(tmp_path / "out", teacher=str(tmp_path / teacher_folder.name))
    assert hashes(tmp_path / "out") == hashes(shards)
    assert encoders(str(tmp_path / teacher_folder.name), "cpu").unet is None


@pytest.mark.slow
def test_workers_do_not_change_a_bit(make_shards, shards, tmp_path):
    make_shards(tmp_path / "out", workers=2)
    assert hashes(tmp_path / "out") == hashes(shards)


@pytest.mark.parametrize("published", [False, True])
def test_published_teachers_get_the_half_pixel_shift(make_shards, teacher_folder, tmp_path, published):
    """Points of the first photograph project to the middles of its pixels, or with ViewCrafter's shift to corners."""
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    index = tmp_path / "teacher" / "model_index.json"
    words = json.loads(index.read_text()) | {"image_resize": "viewcrafter" if published else "antialias"}
    index.write_text(json.dumps(words))
    make_shards(tmp_path / "out", teacher=str(tmp_path / "teacher"))
    make_shards(tmp_path / "other", teacher=str(tmp_path / "teacher"), half_pixel_shift=not published)
    for out, shifted in (("out", published), ("other", not published)):
        clips = ShardSet(tmp_path / out)
        assert clips.settings.half_pixel_shift is shifted
        for clip in (clips[index] for index in range(len(clips))):
            cameras = Cameras(clip.world_from_cam, clip.intrinsics, *SIZE)
            pixels, depth = project(clip.cloud_points[:200], cameras[[0]])
            place = pixels[0] + (0 if shifted else 0.5)
            assert (place - place.round()).abs().max() < 1e-3 and len(place.round().unique(dim=0)) > 100
            assert (pixels > -0.01).all() and (depth > 0).all()


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_together_are_the_whole(make_shards, shards, tmp_path, parts):
    out, one = tmp_path / "out", ShardSet(shards)
    for part in range(parts, 0, -1):
        make_shards(out, part=(part, parts))
        if part > 1:
            assert f"lacks part 1 of {parts}" in refusal(lambda: ShardSet(out))
    many = ShardSet(out)
    assert many.names == one.names and many.records == one.records
    assert all(same_clip(many[i], one[i]) for i in range(len(one)))


def test_broken_inputs_are_skipped_and_listed(make_shards, shard_scenes, shards, tmp_path):
    source = tmp_path / "scenes"
    shutil.copytree(shard_scenes, source)
    (source / "scene0" / "transforms.json").write_text("{")
    image = next(iter(sorted((source / "scene1" / "images").iterdir())))
    image.write_bytes(image.read_bytes()[:100])
    tally = make_shards(tmp_path / "out", source)
    reasons = {entry.name: entry.reason for entry in tally.skipped}
    assert "transforms.json" in reasons["scene0"] and all(str(image) in reasons[n] for n in reasons if n != "scene0")
    assert len(reasons) > 1 and ShardSet(tmp_path / "out").skipped() == tally.skipped
    good, clips = ShardSet(shards), ShardSet(tmp_path / "out")
    assert {"scene2-00", "scene2-01"} <= set(clips.names) < set(good.names)
    for index, name in enumerate(clips.names):  # the others are what they would be without the broken ones
        assert same_clip(clips[index], good[good.names.index(name)])


def test_a_part_may_come_out_empty(make_shards, shard_scenes, shards, tmp_path):
    """Its scene cannot be read; the other parts of the array are a data set all the same."""
    source = tmp_path / "scenes"
    shutil.copytree(shard_scenes, source)
    (source / "scene1" / "transforms.json").write_text("{")
    assert make_shards(tmp_path / "out", source, part=(2, 3)).clips == 0
    for part in (1, 3):
        make_shards(tmp_path / "out", source, part=(part, 3))
    clips, good = ShardSet(tmp_path / "out"), ShardSet(shards)
    assert clips.names == [name for name in good.names if not name.startswith("scene1")]
    assert [entry.name for entry in clips.skipped()] == ["scene1"]


def test_filters_count_what_they_drop(make_shards, tmp_path):
    with pytest.raises(UserError, match="6 x static clip"):
        make_shards(tmp_path / "b", limits=dict.fromkeys(LIMITS, 0.0) | {"motion": 1e6})
    assert not list((tmp_path / "b").glob("*"))
    more = make_shards(tmp_path / "c", clips_per_scene=4)  # four photographs have two windows of three
    assert more.clips == SCENES * 2 and more.dropped == {"no further smooth path": SCENES * 2}
    assert ShardSet(tmp_path / "c").dropped() == dict(more.dropped)


# --- Reading ---


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
def test_settings_that_cannot_work(make_shards, tmp_path, changes, said):
    assert said in refusal(lambda: make_shards(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_remote_shards_are_read_only_where_that_is_allowed(shards, tmp_path, monkeypatch, capsys):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(shards), "/bucket/shards", recursive=True)
    monkeypatch.setenv("FVGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FVGEN_DOWNLOAD", raising=False)
    assert "FVGEN_DOWNLOAD=1" in refusal(lambda: ShardSet("memory://bucket/shards"))
    monkeypatch.setenv("FVGEN_DOWNLOAD", "1")
    clips, local = ShardSet("memory://bucket/shards"), ShardSet(shards)
    assert "memory://bucket/shards" in capsys.readouterr().err
    assert all(same_clip(clips[i], local[i]) for i in range(2)) and clips.names == local.names
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 1  # only what was needed
    name = sorted(shards.glob("shard*"))[1].name
    memory.pipe(f"/bucket/shards/{name}", (shards / name).read_bytes()[:-1])
    assert name in refusal(lambda: clips[2])
    assert "cannot be read" in refusal(lambda: ShardSet("unheard://bucket/shards"))


# --- Training ---


def test_a_stage_trains_on_shards(shards, stage):
    from fvgen.distill import read_metrics, run

    config = stage(data=str(shards))
    run(config)
    assert len(read_metrics(config.run.out)) == 3


def test_shards_of_another_teacher_are_refused(shards, make_shards, shard_scenes, stage, tmp_path):
    from small_models import small_teacher

    from fvgen.distill import run
    from fvgen.pipelines.folders import save_model

    other = small_teacher()
    other.vae.encoder.conv_in.bias.data += 1
    save_model(other, tmp_path / "other")
    said = refusal(lambda: run(stage(data=str(shards), teacher=str(tmp_path / "other"))))
    assert f"were encoded by teacher teacher, which has other encoders than {tmp_path / 'other'}; give" in said
    assert not re.search(r"[0-9a-f]{12}", said)  # a fingerprint, which nobody knows
    assert not Path(stage().run.out).exists()
    save_model(other, tmp_path / "teacher")
    said = refusal(lambda: run(stage(data=str(shards), teacher=str(tmp_path / "teacher"))))
    assert "were encoded by teacher teacher, which has other encoders by now; give the one that made them" in said
    said = refusal(lambda: make_shards(shards, teacher=str(tmp_path / "teacher")))
    assert "holds shards of another teacher teacher, with other encoders; choose another" in said
    shutil.copytree(shard_scenes / "scene0", tmp_path / "scenes" / "scene0")
    said = refusal(lambda: make_shards(shards, tmp_path / "scenes"))
    assert "holds shards of other scenes; choose another" in said
