"""benchmarks/wonderland.py: its data, baselines, scores and page; what is trained is slow."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from checks import refusal
from conftest import REPOSITORY

from fvgen.geometry.cameras import Cameras

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
names = ("wonderland", "wonderland_rows", "wonderland_models", "one_room", "camera_timesteps")
wonderland, rows, models, one_room, camera_timesteps = (import_module(name) for name in names)
SIZE = (5, 24, 32)


def arguments(*words: str) -> SimpleNamespace:
    return wonderland.parser().parse_args(["--teacher", "t", "--part", "camera", *words])


@pytest.fixture(scope="module")
def clip():
    return wonderland.test_clips(arguments("--clips", "1", "--others", "3"), SIZE)[0]


# --- Data ---


@pytest.mark.parametrize("signal", [0.05, 0.3, 0.6])
def test_what_noise_tells_of_two_paths(signal):
    """Two latents at distance D: the log odds are normal, of mean d^2 / 2 and deviation d = D sqrt(ab / (1 - ab))."""
    rooms = 20_000
    z = torch.tensor([[0.0, 0.0], [1.2, 0.9]], dtype=torch.float64).expand(rooms, 2, 2)
    d = 1.5 * (signal / (1 - signal)) ** 0.5
    n = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = (-n.square() / 2).exp()
    wrong = torch.sigmoid(-(d * d / 2 + d * n))
    probability, left = camera_timesteps.told(z, signal, torch.Generator().manual_seed(0))
    # Each is a mean of 40,000 numbers in [0, 1] and [0, 4]: five deviations of 1/2 and 2 at most.
    assert 1 - probability == pytest.approx(((wrong * density).sum() / density.sum()).item(), abs=5 * 0.5 / 200)
    expected = ((wrong.square() * density).sum() / density.sum()).item() * 4  # (D p)^2 of (D / 2)^2
    assert left == pytest.approx(expected, abs=5 * 2 / 200)


def test_rows_that_were_asked_for_otherwise_are_not_mixed(tmp_path):
    words = ("--work", str(tmp_path), "--iterations", "260")
    wonderland.judge_work(arguments(*words))
    wonderland.judge_work(arguments(*words, "--seeds", "3", "--rows", "dual"))
    said = refusal(lambda: wonderland.judge_work(arguments(*words, "--rate", "0.01")))
    assert "holds rows of --rate 0.001, not 0.01" in said
    said = refusal(lambda: wonderland.judge_work(arguments(*words, "--perceptual", "0.1")))
    assert "holds rows of --perceptual 0.0, not 0.1" in said  # whatever could be another row's


def test_claims_name_rows_and_metrics():
    for part in wonderland.ROWS:
        for better, worse, metric in wonderland.CLAIMS[part]:
            assert {better, worse} <= {*wonderland.ROWS[part]} and metric in wonderland.METRICS[part]
        assert wonderland.PAPER[part] and part in wonderland.MAKERS


def test_shares_of_the_bases_blocks():
    def blocks(name: str, layers: int) -> int | None:
        return models.camera_settings(wonderland.ROWS["camera"][name], arguments(), layers).get("control_blocks")

    names = ("control, 1 block", "control, a quarter", "control", "control, all blocks", "LoRA")
    assert [blocks(name, 42) for name in names] == [1, 10, 21, 42, None]  # the paper's 1, 10, 21, and all
    assert [blocks(name, 6) for name in names] == [1, 2, 3, 6, None]
    assert "camera_lora_rank" not in models.camera_settings(wonderland.ROWS["camera"]["control"], arguments(), 6)


def test_every_camera_row_is_a_training_or_of_one(tmp_path):
    args, camera = arguments(), wonderland.ROWS["camera"]
    for words in filter(None, camera.values()):
        if "of" in words:
            assert words.keys() == {"of", "camera_guidance"} and "branch" in camera[words["of"]]
            continue
        settings = models.common(args, tmp_path, 0) | models.camera_settings(words, args, 6)
        models.distill.stage_config("camera", settings | {"iterations": 1, "student_lr": 1e-3})


def test_every_lalrm_row_is_a_training(tmp_path):
    args = arguments()
    for words in wonderland.ROWS["lalrm"].values():
        settings = models.common(args, tmp_path, 0) | models.lalrm_settings(words or {}, args)
        models.distill.stage_config("lalrm", settings | {"iterations": args.lalrm_iterations})


def test_the_scene_of_a_clip_is_the_clips(clip):
    args = arguments()
    images, depth = wonderland.true_render(args, SIZE, 16)(clip.cameras)
    assert torch.equal(images, clip.truth) and torch.equal(depth, clip.others.depth[: SIZE[0]])
    assert clip.known.tolist() == [True, *[False] * 4]


# --- Baselines ---


def test_warping_to_its_own_camera_gives_the_image(clip):
    image, depth = clip.truth[0], clip.others.depth[0]
    made = rows.warped(image, depth, clip.cameras[[0]], clip.cameras)
    # A point's centre is off its pixel's by the rounding of a projection, and its opacity 1 less the square of that.
    torch.testing.assert_close(made[0], image, rtol=0, atol=1e-4)
    # Nearer to the truth than the image as it stands, and without holes.
    errors = ((each - clip.truth[-1]).square().mean() for each in (made[-1], image))
    assert next(errors) < 0.5 * next(errors)
    flat = rows.warped(torch.full_like(image, 0.25), depth, clip.cameras[[0]], clip.others.cameras)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.25), rtol=0, atol=1e-5)


def test_nearest_and_cross_fade(clip):
    assert torch.equal(rows.nearest(clip.truth, clip.cameras, clip.cameras), clip.truth)
    assert torch.equal(rows.cross_fade(clip.truth, clip.cameras, clip.cameras), clip.truth)
    poses = torch.eye(4).repeat(3, 1, 1)
    poses[:, 0, 3] = torch.tensor([0.0, 1.0, 2.0])
    walk = Cameras(poses, torch.eye(3).repeat(3, 1, 1), 4, 6)
    between = replace(walk[[0]], world_from_cam=poses[:1].clone())
    between.world_from_cam[0, 0, 3] = 0.75
    frames = torch.stack([torch.full((3, 4, 6), value) for value in (0.0, 0.4, 1.0)])
    assert torch.equal(rows.nearest(frames, walk, between), frames[1:2])
    torch.testing.assert_close(rows.cross_fade(frames, walk, between), torch.full((1, 3, 4, 6), 0.3))


def test_a_longer_fit_is_closer(clip):
    """To the frames that it is fitted to; and the start on true surfaces is closer than one anywhere."""

    frames, cameras = clip.truth[:2], clip.cameras[:2]

    def error(seconds: float, depth=None) -> float:
        made, facts = rows.fitted(frames, cameras, seconds, depth)
        assert facts["iterations"] >= 1
        return (rows.shown(made, cameras) - frames).square().mean().item()

    short, on_surfaces, longer = error(0.0), error(0.0, clip.others.depth[:2]), error(1.0)
    assert longer < short and on_surfaces < short


# --- Scores ---


def test_true_videos_score_at_the_ceiling(clip):
    scores = rows.score_views([clip.others.images], [clip], [2.0])
    assert scores["psnr"] == 100 and scores["seconds_per_scene"] == 2


def test_a_guided_video_beats_one_that_stays(clip):
    """24x32 pixels: the true video's cameras are found, a still one's gain is that of its own images."""
    render = wonderland.true_render(arguments(), SIZE, 16)
    still = clip.truth[:1].expand(5, -1, -1, -1)
    true = rows.score_guided([clip.truth], [still], [clip], [render])
    assert true["failures"] == 0 and true["R_err"] < 2e-3 and true["T_err_scene"] < 0.01
    stays = rows.score_guided([still], [still], [clip], [render])
    assert stays["camera_gain"] == 0 and stays["R_err_all"] > 10 * true["R_err_all"]
    assert true["camera_gain"] == pytest.approx(true["psnr"] - stays["psnr"], abs=1e-4)
    assert true["frames"] == 4


def test_the_paths_of_one_room_begin_at_one_frame_and_part():
    """Nothing but the path tells its clips apart."""
    one, other = one_room.paths_of_a_room(2, 0, SIZE)
    assert torch.equal(one.truth[0], other.truth[0]) and one.known.tolist() == [True] + 4 * [False]
    assert torch.equal(one.cameras.world_from_cam[0], other.cameras.world_from_cam[0])
    assert (one.cameras.world_from_cam[-1] - other.cameras.world_from_cam[-1]).abs().max() > 0.01
    assert (one.truth[-1] - other.truth[-1]).abs().mean() > 0.01
    assert one_room.score([one.truth[1:]], [one]) > one_room.score([other.truth[1:]], [one]) + 3


def test_other_paths_are_the_next_clips(clip):
    others = [replace(clip, name=str(n), cameras=replace(clip.cameras, width=32)) for n in range(3)]
    mixed = models.shuffled(others)
    assert [c.name for c in mixed] == ["0", "1", "2"]
    assert [c.cameras for c in mixed] == [others[1].cameras, others[2].cameras, others[0].cameras]


# --- Rows and page ---


def test_untrained_rows_run_resume_and_make_a_page(tmp_path, monkeypatch):
    args = arguments("--clips", "1", "--others", "2", "--work", str(tmp_path), "--seeds", "0", "1")
    args.part, args.rows = "lalrm", ["warped by true depth", "nearest frame"]
    monkeypatch.setattr(wonderland, "size_of", lambda args: SIZE)
    wonderland.run_missing(args)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json")}
    assert len(files) == 4
    monkeypatch.setitem(wonderland.MAKERS, "lalrm", None)  # nothing is to be made again
    wonderland.run_missing(args)
    by_row = wonderland.collected(args)
    assert [*by_row] == args.rows
    found = wonderland.summary("lalrm", by_row)
    text = wonderland.markdown("lalrm", found, {"seeds": args.seeds})
    assert "| nearest frame |" in text and "| RealEstate10K | LaLRM | 0.292 |" in text and "not run" in text
    json.dumps(found)


def test_verdicts_follow_the_metrics_direction():
    def by_seed(better: float, worse: float, metric: str):
        return {
            "dual": [{metric: better + 0.001 * s} for s in range(3)],
            "base, no camera": [{metric: worse + 0.0011 * s} for s in range(3)],
        }

    for metric, good in (("R_err_all", (0.1, 0.4)), ("camera_gain", (3.0, 0.0)), ("psnr", (20.0, 15.0))):
        for pair, verdict in ((good, "reproduced"), (good[::-1], "not reproduced")):
            claims = wonderland.summary("camera", by_seed(*pair, metric))["claims"]
            said = {(c["claim"], c["metric"]): c["found"] for c in claims}
            assert said["dual beats base, no camera", metric] == verdict
            assert said["dual beats control", "R_err_all"] == "not run"


def test_the_base_row_with_a_tiny_random_model(tmp_path):
    """It sees no camera and knows nothing: what it shows is found nowhere, counted, and no path helps."""
    from small_cogvideox import small_teacher

    from fvgen.pipelines.folders import save_model

    save_model(small_teacher(image_condition="first"), tmp_path / "teacher")
    args = arguments("--clips", "1", "--others", "1", "--steps", "1")
    args.teacher = tmp_path / "teacher"
    row = wonderland.camera_row("base, no camera", args, 0)
    assert row["frames"] == 8 and row["failures"] >= 8 and row["camera_gain"] == 0
    assert row["psnr"] < 20 and row["R_err_all"] > 0.05
