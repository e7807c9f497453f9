"""The recipes as a user runs them: `python recipes/...`, Python's own start included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from small_models import FRAMES, HEIGHT, WIDTH

from fvgen.clips.builtin import DATA_SEED
from fvgen.clips.rooms import synthetic_clip
from fvgen.clips.worlds import WORLDS
from fvgen.metrics import psnr
from fvgen.models.cogvideox.vae import decode, encode
from fvgen.models.viewcrafter.pipelines import FVGenPipeline
from fvgen.pipelines.folders import load_pipeline
from fvgen.pipelines.teacher import TeacherPipeline

pytestmark = pytest.mark.slow  # each test starts Python several times, and torch with it
REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "recipes" / "configs" / "tiny.yaml"


def python(*words: object) -> subprocess.CompletedProcess:
    """A fresh Python, in the repository's folder."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def stages(teacher_folder, clip_folder, tmp_path_factory) -> tuple[Path, Path]:
    """The folders of both stages, run as the README says but for sizes."""
    gan, dmd = (tmp_path_factory.mktemp("runs") / name for name in ("gan", "dmd"))
    common = [f"teacher={teacher_folder}", f"data={clip_folder}", "iterations=3", "batch_size=2"]
    first = python("recipes/stage1_gan.py", "--config", CONFIG, f"out={gan}", "head_warmup=0", *common)
    assert (first.returncode, first.stderr) == (0, ""), first.stderr
    assert f"Student after stage 1: {gan / 'student'}" in first.stdout.replace("\n", "")
    # The options may also stand behind or between the settings.
    second = python("recipes/stage2_dmd.py", f"init={gan}", "--config", CONFIG, f"out={dmd}", *common)
    assert (second.returncode, second.stderr) == (0, ""), second.stderr
    assert f"Student after stage 2: {dmd / 'student'}" in second.stdout.replace("\n", "")
    return gan, dmd


def test_every_line_of_the_metrics_is_an_iteration_with_losses(stages):
    for folder, losses in zip(stages, (3, 5), strict=True):
        lines = rows(folder)
        assert [line["iteration"] for line in lines] == [1, 2, 3]
        for line in lines:
            assert sum("loss" in key for key in line) >= losses
            assert all(isinstance(value, float) for key, value in line.items() if key != "iteration")


def test_the_result_is_a_student_that_loads(stages, teacher_folder):
    for folder in stages:
        assert load_pipeline(folder / "student", FVGenPipeline).config.steps == 4
        leaked = [p for p in (folder / "student").rglob("*.json") if str(teacher_folder) in p.read_text()]
        assert not leaked, "the student's folder names a folder of this machine"


def test_the_benchmark_scores_teachers_and_students(stages, teacher_folder, clip_folder, tmp_path):
    for model, nfe in ((stages[1] / "student", 4), (teacher_folder, 12)):
        words = ["benchmarks/quality.py", "--model", model, "--data", clip_folder, "--clips", 1]
        outcome = processes.run(words, tmp_path)
        assert (outcome.code, outcome.err) == (0, "")
        result = json.loads(outcome.out.splitlines()[-1])
        (row,) = result["models"]
        assert (row["model"], row["nfe"], row["n"]) == (str(model), nfe, FRAMES - 2) and result["clips"] == 1
        assert row["psnr"] > 0 and result["render"]["nfe"] == 0
        assert f"{HEIGHT}x{WIDTH}" in row["why_null"]["lpips"]  # too small for LPIPS's networks
    outcome = processes.run([*words, "--steps", "0"], tmp_path)
    assert outcome.code == 2 and outcome.err.startswith("fvgen: argument --steps: '0' is no number of at least 1")


@pytest.mark.parametrize(
    ("script", "word"),
    [
        ("recipes/stage1_gan.py", "GAN initialisation"),
        ("recipes/stage2_dmd.py", "init"),
        ("benchmarks/quality.py", "--model"),
        ("fvgen.cli", "demo"),
    ],
)
def test_help_tells_how(script, word, tmp_path):
    outcome = processes.run([script, "--help"], tmp_path)
    assert (outcome.code, outcome.err) == (0, "") and word in outcome.out


def test_the_command_without_words_shows_its_help(tmp_path):
    outcome = processes.run(["fvgen.cli"], tmp_path)
    assert (outcome.code, outcome.err) == (0, "") and "demo" in outcome.out


def test_a_mistake_is_one_sentence_from_a_fresh_python_too(tmp_path):
    outcome = python("-m", "fvgen.cli", "demo", "--data", tmp_path / "none", "--out", tmp_path / "out")
    assert outcome.returncode == 2 and outcome.stdout == ""
    assert outcome.stderr.startswith("fvgen: data folder") and outcome.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_the_world_vae_that_is_kept_knows_a_clip(monkeypatch):
    """Nine frames in three latent ones, and back closer than each frame's mean colour is."""
    monkeypatch.syspath_prepend(REPOSITORY / "recipes")
    from train_cogvideox_world import load_vae

    frames = synthetic_clip("test", DATA_SEED, 6, 9, 48, 64, WORLDS["builtin-coarse"]).truth
    vae = load_vae(REPOSITORY / "recipes/weights/world-vae").eval()
    latents, _ = encode(vae, frames[None])
    assert latents.shape == (1, 16, 3, 12, 16)
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.5)
    # Of one clip alone; where channels keep their means and one number divides them, .50.
    assert vae.config.latents_mean and latents.mean((0, 2, 3, 4)).square().mean() < 0.15
    back = decode(vae, latents)[0]
    assert psnr(back, frames).mean() > psnr(frames.mean((2, 3), keepdim=True).expand_as(frames), frames).mean() + 3


def test_a_teacher_of_cogvideox_kind_is_trained_by_the_clock(tmp_path):
    words = ["--out", tmp_path / "world", "--image-condition", "first", "--device", "cpu", "--minutes", "0.2"]
    words += ["--vae-minutes", "0.03", "--clips", "4", "--batch", "2", "--vae-batch", "1", "--widths", "8", "8", "8"]
    done = python("recipes/train_cogvideox_world.py", *words, "--layers", "1", "--heads", "1")
    assert done.returncode == 0, done.stderr
    log = json.loads(done.stdout.splitlines()[-1])
    assert log["vae"]["iterations"] > 0 and log["teacher"]["iterations"] > 0
    assert load_pipeline(tmp_path / "world" / "teacher", TeacherPipeline).config.image_condition == "first"

    before = (tmp_path / "world/teacher/vae/diffusion_pytorch_model.safetensors").read_bytes()
    words = ["--init", tmp_path / "world/teacher", "--image-condition", "ends", "--device", "cpu", "--minutes", "0.1"]
    words += ["--clips", "4", "--batch", "2", "--layers", "1", "--heads", "1", "--out", tmp_path / "on"]
    done = python("recipes/train_cogvideox_world.py", *words)
    assert done.returncode == 0, done.stderr
    assert "vae" not in json.loads(done.stdout.splitlines()[-1])
    assert (tmp_path / "on/teacher/vae/diffusion_pytorch_model.safetensors").read_bytes() == before
    assert load_pipeline(tmp_path / "on" / "teacher", TeacherPipeline).config.image_condition == "ends"


def test_the_proving_grounds_teacher_goes_on_with_one_kind_of_clips(tmp_path):
    words = ["--init", REPOSITORY / "recipes/weights/proving-ground", "--data", "builtin-rough", "--device", "cpu"]
    words += ["--minutes", "0.3", "--clips", "2", "--batch", "1", "--rate", "1e-4", "--out", tmp_path]
    done = python("recipes/train_proving_ground.py", *words)
    assert done.returncode == 0, done.stderr
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["clips"] == {"count": 2, "mix": ["builtin-rough"]}
    assert log["teacher"]["iterations"] > 0 and log["teacher"]["rate"] == 1e-4
    assert load_pipeline(tmp_path / "teacher", TeacherPipeline).frames == 8
