"""One world of data: whatever a user names is judged by its files, and scored on when it has pixels."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from checks import refusal
from conftest import REPOSITORY
from scene_files import NAMES, VIEWS, document, write_depth, write_nerfstudio
from small_models import FRAMES, STEPS, small_teacher, student_of

from fvgen.clips.filters import LIMITS
from fvgen.clips.folder import ClipFolder
from fvgen.pipelines.folders import save_model
from fvgen.posing.sources import Source
from fvgen.reports.data import kind_of, open_clips, split, split_views
from fvgen.scenes.formats import read_scene
from fvgen.shards.encoders import render_needs
from fvgen.shards.reader import ShardClips, ShardSet

KEEP_ALL = dict.fromkeys(LIMITS, 0.0)


@pytest.fixture(scope="module")
def kept(make_shards, tmp_path_factory) -> Path:
    """Shards with frames."""
    out = tmp_path_factory.mktemp("kept") / "shards"
    make_shards(out, keep_frames=True)
    return out


@pytest.fixture
def quality(monkeypatch, capsys):
    """The benchmark with these words, in this process; its last line."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))

    def run(*words: object) -> dict:
        monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, words)])
        import_module("quality").main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


# --- Kinds ---


def test_kinds_are_told_by_files(kept, clip_folder, shard_scenes, tmp_path):
    named = {"builtin": "builtin", kept: "shards", clip_folder: "clips", shard_scenes: "scenes"}
    named |= {"s3://bucket/shards": "shards", shard_scenes / "scene0": "scenes"}
    assert {data: kind_of(data) for data in named} == named
    assert "does not exist" in refusal(lambda: kind_of(tmp_path / "none"))
    assert "is empty" in refusal(lambda: kind_of(tmp_path))
    (tmp_path / "file").touch()
    assert "is a file but no video" in refusal(lambda: kind_of(tmp_path / "file"))


def test_each_kind_gives_clips(kept, clip_folder, shards, shard_scenes, teacher_folder, tmp_path):
    made = tmp_path / "made"
    choices = {"frames": 3, "size": (16, 24), "clips_per_scene": 2, "limits": KEEP_ALL, "workers": 1}
    assert isinstance(open_clips(clip_folder, made, "unused"), ClipFolder)
    assert "--keep-frames" in refusal(lambda: open_clips(shards, made, "unused"))
    assert not made.exists()
    fresh, before = open_clips(shard_scenes, made, str(teacher_folder), **choices), open_clips(kept, made, "unused")
    assert isinstance(before, ShardClips) and fresh.names == before.names
    for a, b in zip(fresh, before, strict=True):
        assert torch.equal(a.truth, b.truth) and torch.equal(a.render, b.render)
    assert "other settings" in refusal(
        lambda: open_clips(shard_scenes, made, str(teacher_folder), **choices | {"seed": 1})
    )


def test_scenes_that_are_skipped_are_told(shard_scenes, teacher_folder, tmp_path, capsys):
    shutil.copytree(shard_scenes / "scene0", tmp_path / "data" / "good")
    (tmp_path / "data" / "bad").mkdir()
    (tmp_path / "data" / "bad" / "transforms.json").write_text("{")
    choices = {"frames": 3, "size": (16, 24), "clips_per_scene": 2, "limits": KEEP_ALL}
    clips = open_clips(tmp_path / "data", tmp_path / "out", str(teacher_folder), **choices)
    assert clips.names == ["good-00", "good-01"] and "fvgen: skipped bad: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hololens_office", "fox"])
def test_a_real_scene(shared, tmp_path, name):
    """With depth maps and with triangulated points: what is seen of the cloud looks like the hidden photographs."""
    points = {"hololens_office": "depth", "fox": "colmap"}[name]
    choices = {"frames": 5, "clips_per_scene": 1, "points": points, "limits": KEEP_ALL}
    clip = open_clips(shared / "data" / "scenes" / name, tmp_path / "out", "tiny", **choices)[0]
    unknown = ~clip.known
    truth, render = clip.truth[unknown], clip.render[unknown]
    seen = (render.amax(1) > 0.05) & (truth.amax(1) > 0.05)
    assert truth.shape[2:] == (48, 64) and seen.float().mean() > (0.5 if name == "hololens_office" else 0.1)
    dots = render.movedim(1, -1)[seen]
    colors = truth.movedim(1, -1)[seen]
    assert torch.corrcoef(torch.stack([dots.flatten(), colors.flatten()]))[0, 1] > 0.5
    turned = truth.flip(-1).movedim(1, -1)[seen]  # mirrored photographs fit worse: it is no mere brightness
    assert (dots - colors).abs().mean() < 0.8 * (dots - turned).abs().mean()


# --- Split ---


@pytest.mark.parametrize("count", range(2, 13))
def test_split_keeps_all_scenes_once_and_in_order(count):
    scenes = [f"s{i:02d}" for i in range(count)]
    train, held_out = split(scenes)
    assert sorted(train + held_out) == scenes and train == sorted(train)
    assert held_out == [f"s{i:02d}" for i in range(1, count, 4)] and len(train) >= len(held_out) >= 1


def test_one_scene_is_split_by_its_photographs(tmp_path):
    """The last quarter, or as many as a clip needs, is held out; pixels, cameras, depths and masks are the same ones,
    and no photograph is on both sides."""
    folder = tmp_path / "scene"
    folder.mkdir()
    write_depth(folder)
    contents = document(depth=True) | {"k1": 0.01}
    contents["frames"][1]["mask_path"] = "depth/01.png"
    write_nerfstudio(folder, contents)
    whole = read_scene(folder)
    train, held = split_views(Source("desk", folder), 2, tmp_path / "split")
    assert (train.name, held.name) == ("desk-train", "desk-held-out")
    parts = [read_scene(source.path) for source in (train, held)]
    assert [path.name for part in parts for path in part.image_paths] == NAMES
    views = iter(range(VIEWS))
    for part in parts:
        for view in range(len(part)):
            whole_view = next(views)
            assert (part.image(view) == whole.image(whole_view)).all()
            assert torch.equal(part.depth(view), whole.depth(whole_view))
            assert (view in part.masks) == (whole_view in whole.masks)
    joined = torch.cat([part.cameras.world_from_cam for part in parts])
    torch.testing.assert_close(joined, whole.cameras.world_from_cam, rtol=0, atol=1e-6)
    torch.testing.assert_close(parts[0].cameras.intrinsics, whole.cameras.intrinsics[:2], rtol=1e-6, atol=0)


def test_one_scene_that_is_too_small_to_split(tmp_path):
    write_nerfstudio(tmp_path / "scene")
    sentence = refusal(lambda: split_views(Source("desk", tmp_path / "scene"), 3, tmp_path / "split"))
    assert "has 4 photographs with poses" in sentence and "give 6 or more" in sentence
    assert not (tmp_path / "split").exists()


# --- What models need ---


def test_models_say_how_renders_for_them_are_made(shipped, teacher):
    """ViewCrafter's own figures: 0.01 from 288 rows on, and points that lie half a pixel off."""
    from fvgen.models.viewcrafter.pipelines import ViewCrafterPipeline
    from fvgen.pipelines.folders import load_pipeline

    tiny = load_pipeline(shipped, ViewCrafterPipeline)
    published = small_teacher(image_resize="viewcrafter")
    for model in (published, student_of(published)):
        assert render_needs(model, None, None, None) == (FRAMES, 320, 512, 0.01, True, False)
    assert render_needs(published, 3, (576, 1024), False) == (3, 576, 1024, 0.01, False, False)
    assert render_needs(tiny, None, None, None) == (8, 48, 64, pytest.approx(0.06), False, False)
    assert render_needs(tiny, None, (96, 128), True) == (8, 96, 128, pytest.approx(0.03), True, False)
    assert render_needs(tiny, None, (96, 128), None, True) == (8, 96, 128, pytest.approx(0.06), False, True)
    assert "multiples of" in refusal(lambda: render_needs(tiny, None, (50, 64), None))
    assert "is too small" in refusal(lambda: render_needs(tiny, None, (0, 64), None))


def test_a_student_may_prepare_for_itself(make_shards, shards, teacher, tmp_path):
    """It has its teacher's encoders: the same latents."""
    save_model(student_of(teacher), tmp_path / "student")
    make_shards(tmp_path / "out", teacher=str(tmp_path / "student"))
    a, b = ShardSet(tmp_path / "out"), ShardSet(shards)
    assert a.settings.encoder == b.settings.encoder
    a, b = a[0].tensors(), b[0].tensors()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- Scoring ---


def test_a_student_of_shards_is_scored_on_shards_that_it_has_not_seen(
    make_shards, shard_scenes, stage, teacher_folder, quality, tmp_path
):
    """Prepare, train, score: one command each; here with all models in one call, and one of them twice."""
    from fvgen.distill import run

    seen, unseen = tmp_path / "seen", tmp_path / "unseen"
    make_shards(seen, shard_scenes / "scene0")
    make_shards(unseen, shard_scenes / "scene1", keep_frames=True)
    student = run(stage(data=str(seen)))
    result = quality("--model", student, teacher_folder, student, "--data", unseen, "--few-steps", 2)
    assert (result["data"], result["clips"], result["frames"]) == (str(unseen), 2, 3)
    rows = [(row["model"], row.get("way"), row["nfe"]) for row in result["models"]]
    assert rows[0] == rows[-1] == (str(student), None, 4) and rows[1] == (str(teacher_folder), None, 2 * STEPS)
    assert {way for _, way, _ in rows[2:-1]} >= {"DDIM eta 1, guided", "renoise, plain"} and len(rows) == 9
    first, last = result["models"][0], result["models"][-1]
    assert first["psnr"] == last["psnr"] > 0 and first["n"] == 2  # the same clips and the same noise
    assert first["seconds_per_clip"] > first["encode_seconds"] > 0 and result["render"]["nfe"] == 0


def test_scoring_is_refused_before_anything_is_read(
    shards, kept, clip_folder, teacher_folder, quality, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise AssertionError("a model was read")

    monkeypatch.setattr("fvgen.pipelines.folders.load_pipeline", fail)
    monkeypatch.setattr("fvgen.shards.encoders.load_pipeline", fail)
    model = ("--model", teacher_folder)
    assert f"data folder {tmp_path / 'none'} does not exist" in refusal(
        lambda: quality(*model, "--data", tmp_path / "none")
    )
    assert "is empty" in refusal(lambda: quality(*model, "--data", tmp_path))
    assert "no model folder" in refusal(lambda: quality("--model", teacher_folder, "huge", "--data", kept))
    assert "with --keep-frames" in refusal(lambda: quality(*model, "--data", shards))
    monkeypatch.undo()


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "fvgen.cli", "prepare", "none", "--out", "out"],
        ["-m", "fvgen.cli", "inspect", "none"],
        ["-m", "fvgen.cli", "demo", "--data", "none", "--out", "out"],
        ["-m", "fvgen.cli", "demo", "--held-out", "none", "--out", "out"],
        [str(REPOSITORY / "benchmarks" / "quality.py"), "--model", "tiny", "--data", "none"],
    ],
    ids=lambda words: " ".join(words[-4:-1]),
)
def test_a_wrong_path_is_told_before_torch_is_imported(words, tmp_path):
    """Which takes ten seconds and more on a busy machine."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY / 'src'}", "PATH": ""}
    outcome = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert outcome.stderr == "fvgen: data folder none does not exist; check the path\n" and outcome.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["torch.py"]


# --- The demo ---


@pytest.fixture
def short(monkeypatch):
    """The tiny preset's settings, but two iterations of small networks."""
    from fvgen.distill import read_yaml

    def settings(file: str) -> dict:
        few = {"iterations": 2}
        read = read_yaml(file)
        gan, dmd = read["gan"] | few | {"head_warmup": 0}, read["dmd"] | few
        return read | {"batch_size": 2, "head_channels": 8, "gan": gan, "dmd": dmd}

    monkeypatch.setattr("fvgen.reports.demo.read_yaml", settings)


@pytest.mark.parametrize("kind", ["scenes", "shards"])
def test_a_demo_with_any_teacher_on_any_data(kind, short, shards, kept, shard_scenes, teacher_folder, tmp_path):
    from fvgen.reports.demo import demo

    data = {
        "scenes": {"data": shard_scenes, "frames": 3, "size": (16, 24)},
        "shards": {"data": shards, "held_out": kept},
    }
    report = demo(tmp_path / "out", teacher=str(teacher_folder), **data[kind])
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["frames"], report["height"], report["width"]) == (3, 16, 24)
    assert report["scenes"] == (["scene1"] if kind == "scenes" else ["scene0", "scene1", "scene2"])
    rows = report["rows"]
    assert rows["teacher"]["nfe"] == 2 * STEPS and rows["student"]["psnr"] > 0
    assert rows["teacher_few"] == report["teacher_few_ways"][report["teacher_few_by"]]
    assert len(report["teacher_few_ways"]) == 6
    assert all(
        row["psnr"] <= rows["teacher_few"]["psnr"] for row in report["teacher_few_ways"].values()
    )  # no LPIPS here
    fields = (REPOSITORY / "docs" / "report.md").read_text()
    assert not [key for key in (*report, *rows["student"]) if f"`{key}`" not in fields]
    if kind == "scenes":
        config = (tmp_path / "out" / "stage2_dmd" / "config.yaml").read_text()
        assert str(tmp_path / "out" / "data" / "train") in config
        assert not {record.scene for record in ShardSet(tmp_path / "out" / "data" / "train").records} & {"scene1"}


def test_demos_that_cannot_be_judged(shards, kept, teacher_folder, tmp_path):
    from fvgen.reports.demo import demo

    out, model = tmp_path / "out", {"teacher": str(teacher_folder)}
    assert "say with --held-out which clips judge" in refusal(lambda: demo(out, kept, **model))
    assert "with --keep-frames" in refusal(lambda: demo(out, kept, held_out=shards, **model))
    (tmp_path / "empty").mkdir()
    assert "is empty" in refusal(lambda: demo(out, kept, held_out=tmp_path / "empty", **model))
    assert "no model folder" in refusal(lambda: demo(out, kept, held_out=kept, teacher="huge"))
    assert not out.exists()
