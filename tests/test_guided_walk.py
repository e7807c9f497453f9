"""`fvgen generate` with a model that is guided by cameras: one photograph is enough, and the path is obeyed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checks import refusal
from PIL import Image
from small_cameras import SETTINGS, cameras, moved
from small_cogvideox import FRAMES, HEIGHT, WIDTH, small_teacher

import fvgen
from fvgen import distill
from fvgen.clips.filters import LIMITS
from fvgen.models.lalrm import LaLRM
from fvgen.pipelines.folders import load_pipeline, save_model
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.shards.prepare import prepare
from fvgen.splats.feedforward import Latent, fresh, kept, walked
from fvgen.splats.ply import read_splat
from fvgen.splats.raymap import reconstructed


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An image-to-video model whose camera branches are no longer silent."""
    folder = tmp_path_factory.mktemp("models") / "guided"
    pipeline = small_teacher(image_condition="first").with_cameras(**SETTINGS)
    moved(pipeline.transformer)
    save_model(pipeline, folder)
    return folder


@pytest.fixture
def photograph(tmp_path) -> Path:
    pixels = (torch.rand(HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(3)) * 255).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "room.png")
    return tmp_path / "room.png"


def test_one_photograph_without_depth_walks(model, photograph, tmp_path):
    frames = {}
    for path in ("orbit:20", "orbit:-20"):
        out = fvgen.generate(photograph, tmp_path / path.replace(":", ""), model=model, trajectory=path, steps=2)
        run = json.loads((out / "run.json").read_text())
        assert (run["points"], run["result"]["points"]) == ("flat", "flat") and len(run["result"]["frames"]) == FRAMES
        frames[path] = list(run["result"]["frames"].values())
    assert frames["orbit:20"][-1] != frames["orbit:-20"][-1]


def test_a_path_out_of_sight_of_the_photograph_is_no_mistake(model, photograph, tmp_path):
    out = fvgen.generate(photograph, tmp_path / "walk", model=model, trajectory="pan:170", steps=1)
    assert json.loads((out / "run.json").read_text())["result"]["coverage"][-1] == 0


def test_others_still_want_depth(photograph, tmp_path, monkeypatch):
    for name in ("FVGEN_DEPTH_PRO", "FVGEN_DUST3R"):
        monkeypatch.delenv(name, raising=False)
    assert "tells no depth by itself" in refusal(lambda: fvgen.generate(photograph, tmp_path / "walk"))
    assert not (tmp_path / "walk").exists()


def test_latents_become_a_scene_without_a_fit(model, photograph, tmp_path):
    torch.manual_seed(0)
    lalrm_sizes = {"width": 32, "layers": 1, "head_dim": 16}
    lalrm = LaLRM(**lalrm_sizes)
    save_model(load_pipeline(model, TeacherPipeline).with_lalrm(lalrm), tmp_path / "wonderland")
    said: list[str] = []
    options = {"model": tmp_path / "wonderland", "trajectory": "dolly", "steps": 1, "frames": 2 * FRAMES - 1}
    out = fvgen.generate(photograph, tmp_path / "walk", **options, scene=True, told=said.append)
    facts = json.loads((out / "scene.json").read_text())
    assert len(facts["views"]) == 2 * FRAMES - 1  # frames that clips share are one camera
    assert facts["from"] == "latents.safetensors" and f"{facts['gaussians']} Gaussians" in " ".join(said)
    clips = kept(out, HEIGHT, WIDTH)
    assert len(clips) == 3 and clips[0].latents.shape == (1, 16, 3, 4, 6)  # 17 frames by 9s that share 4
    assert facts["gaussians"] == (2 * FRAMES - 1) * HEIGHT * WIDTH // 4  # so are Gaussians, one for 2 x 2 pixels
    new = torch.arange(FRAMES) >= torch.tensor([[0], [5], [5]])
    expected = [reconstructed(lalrm, *clip, wanted) for clip, wanted in zip(clips, new, strict=True)]
    assert facts["gaussians"] == sum(len(part) for part in expected)
    assert torch.equal(read_splat(out / "scene.ply").means[: len(expected[0])], expected[0].means)
    assert (out / "scene.html").is_file() and (out / "video.mp4").is_file()
    # The same walk asked for its scene later needs no second walk.
    (out / "scene.json").unlink(), (out / "scene.ply").unlink(), (out / "scene.html").unlink()
    fvgen.generate(photograph, tmp_path / "walk", **options, scene=True)
    assert json.loads((out / "scene.json").read_text()) == facts
    # Another LaLRM makes another scene: the folder is not its.
    save_model(load_pipeline(model, TeacherPipeline).with_lalrm(LaLRM(**lalrm_sizes)), tmp_path / "wonderland")
    assert "holds another run (weights differs)" in refusal(lambda: fvgen.generate(photograph, out, **options))


def test_only_what_clips_share_is_left_out():
    """A walk that comes back to a place, bit for bit, keeps the cameras of both visits."""
    there = cameras(0, FRAMES)
    back = there[list(range(FRAMES - 1, -1, -1))]
    nothing = torch.zeros(1, 16, 3, 4, 6)
    clips = [Latent(nothing, there), Latent(nothing, back), Latent(nothing, back[[8, *range(8)]])]
    assert [int(new.sum()) for new in fresh(clips)] == [FRAMES, FRAMES - 1, FRAMES - 1]
    poses = walked(clips).world_from_cam
    assert torch.equal(poses, torch.cat([there.world_from_cam, back.world_from_cam[1:], back.world_from_cam[:-1]]))
    turned = replace(there, intrinsics=there.intrinsics * 1.5)  # a zoom where the camera stands is no overlap
    assert fresh([clips[0], Latent(nothing, turned)])[1].all()


@pytest.mark.slow
def test_walks_are_data_for_a_second_stage(model, photograph, tmp_path):
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 1, "head_dim": 16}
    save_model(load_pipeline(model, TeacherPipeline).with_lalrm(LaLRM(**sizes)), tmp_path / "first")
    walk = {"model": tmp_path / "first", "trajectory": "dolly", "steps": 1, "frames": 2 * FRAMES - 1}
    fvgen.generate(photograph, tmp_path / "walks" / "a", **walk)
    made = {"teacher": str(tmp_path / "first"), "clips_per_scene": 1, "limits": dict.fromkeys(LIMITS, 0.0)}
    choices = {"keep_frames": True, "points": "flat", "workers": 1, **made}
    assert prepare([tmp_path / "walks"], tmp_path / "shards", FRAMES, (HEIGHT, WIDTH), **choices).clips == 1
    settings = {"out": str(tmp_path / "second"), "teacher": str(tmp_path / "first"), "data": str(tmp_path / "shards")}
    settings |= {"iterations": 1, "batch_size": 1, "unseen_views": 0, "perceptual_weight": 0.0, "track": False, **sizes}
    second = distill.run(distill.stage_config("lalrm", settings))
    before, after = (load_pipeline(folder, TeacherPipeline).lalrm for folder in (tmp_path / "first", second))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
