"""Scoring: who is compared with whom, on what, and with which noise."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from small_models import LATENTS, STEPS, small_clips, small_teacher, student_of

from fvgen.clips.clip import Clip
from fvgen.errors import UserError
from fvgen.reports.evaluate import (
    Contestant,
    best,
    better,
    evaluate,
    few_step_teachers,
    score,
    score_renders,
    score_videos,
    student_contestant,
    teacher_contestant,
)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return small_clips(2)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_known_frames_are_not_scored(clips):
    noise = torch.rand(clips[0].truth.shape, generator=torch.Generator().manual_seed(0))
    known = clips[0].known[:, None, None, None]
    right = [torch.where(known, noise, clip.truth) for clip in clips]
    wrong = [torch.where(known, clip.truth, noise) for clip in clips]
    assert score_videos(right, clips)["psnr"] == 100 and score_videos(right, clips)["n"] == 4
    assert score_videos(wrong, clips)["psnr"] < 15


def test_hidden_pixels_are_not_scored(clips):
    shown = torch.zeros_like(clips[0].truth[:, 0], dtype=torch.bool)
    shown[..., : shown.shape[-1] // 2] = True
    masked = [dataclasses.replace(clips[0], shown=shown), clips[1]]
    noise = torch.rand(clips[0].truth.shape, generator=stream())
    videos = [torch.where(shown[:, None], clips[0].truth, noise), clips[1].truth]
    assert score_videos(videos, masked)["psnr"] == 100 and score_videos(videos, clips)["psnr"] < 99
    with pytest.raises(UserError, match="shown is"):
        dataclasses.replace(clips[0], shown=shown[:1])


def test_a_render_is_scored_without_evaluations(clips):
    row = score_renders(clips)
    assert (row["steps"], row["nfe"], row["seconds_per_clip"]) == (0, 0, None)
    assert 3 < row["psnr"] < 30 and row["n"] == 4
    full = [dataclasses.replace(clip, render=clip.truth) for clip in clips]
    assert score_renders(full)["psnr"] == 100


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ({"lpips": 0.1, "psnr": 10.0}, {"lpips": 0.2, "psnr": 20.0}, True),
        ({"lpips": 0.2, "psnr": 20.0}, {"lpips": 0.1, "psnr": 10.0}, False),
        ({"lpips": None, "psnr": 20.0}, {"lpips": None, "psnr": 10.0}, True),
        ({"lpips": None, "psnr": 10.0}, {"lpips": 0.1, "psnr": 20.0}, False),
        ({"lpips": None, "psnr": None}, {"lpips": None, "psnr": 5.0}, False),
        ({"lpips": None, "psnr": 5.0}, {"lpips": None, "psnr": None}, True),
        ({"lpips": 0.1, "psnr": 10.0}, {"lpips": 0.1, "psnr": 10.0}, False),
    ],
)
def test_better_goes_by_lpips_then_by_psnr(a, b, expected):
    assert better(a, b) is expected


def test_a_contestant_leaves_its_network_trainable(clips):
    teacher = small_teacher()
    ways = {"teacher": teacher_contestant(teacher)} | few_step_teachers(teacher, 1)
    evaluate(ways, clips[:1], teacher, seed=0)
    assert all(parameter.requires_grad for parameter in teacher.unet.parameters())


def test_the_null_condition_is_encoded_once_for_all_clips(clips):
    teacher = small_teacher()
    seen = []
    teacher.image_encoder.register_forward_pre_hook(lambda _, args: seen.append(args))
    contestants = {"teacher": teacher_contestant(teacher, steps=1)}
    assert len(seen) == 1
    evaluate(contestants, clips, teacher, seed=0)
    assert len(seen) == 1 + len(clips)  # and a photograph of each


def test_evaluations_are_counted_as_they_happen(teacher, clips):
    student = student_of(teacher, steps=2)
    contestants = {"teacher": teacher_contestant(teacher), "student": student_contestant(student)}
    contestants |= few_step_teachers(teacher, 4)
    assert {name: (c.steps, c.nfe) for name, c in contestants.items()} == {
        "teacher": (STEPS, 2 * STEPS),
        "student": (2, 2),
        "renoise, guided": (4, 8),
        "DDIM eta 0, guided": (4, 8),
        "DDIM eta 1, guided": (4, 8),
        "renoise, plain": (4, 4),
        "DDIM eta 0, plain": (4, 4),
        "DDIM eta 1, plain": (4, 4),
    }
    condition = teacher.condition(clips[0].render[None], torch.Generator().manual_seed(0))
    for name, contestant in contestants.items():
        sizes = []
        hook = teacher.unet.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(args[0].shape[0]))
        contestant.sample(condition, torch.Generator().manual_seed(0))
        hook.remove()
        assert sum(sizes) == contestant.nfe, name


def test_the_few_step_teacher_without_guidance_samples_as_a_student_does(teacher, clips):
    plain, student = few_step_teachers(teacher, 4)["renoise, plain"], student_contestant(student_of(teacher))
    results = evaluate({"plain": plain, "student": student}, clips, teacher, seed=3)
    for ours, theirs in zip(results["plain"].videos, results["student"].videos, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.shape == clips[0].truth.shape


def test_ddim_is_among_the_ways_of_the_untrained_teacher(teacher, clips):
    """Against ViewCrafter's sampler itself, and eta 0 by hand: no noise after x_T."""
    ways, condition = few_step_teachers(teacher, 4), teacher.condition(clips[0].render[None], stream())
    for name, guidance in (("guided", teacher.config.guidance), ("plain", 1.0)):
        for eta in (0.0, 1.0):
            expected = teacher.sample(condition, stream(), 4, guidance, eta=eta)
            assert torch.equal(ways[f"DDIM eta {eta:.0f}, {name}"].sample(condition, stream()), expected)
    rng = stream()
    x_T = ways["DDIM eta 0, plain"].sample(condition, rng)
    after = torch.randn(3, generator=rng)
    torch.randn(condition["render_latents"].shape, generator=(again := stream()))
    assert torch.equal(after, torch.randn(3, generator=again)) and x_T.isfinite().all()
    assert few_step_teachers(small_teacher(guidance=1.0), 2).keys() == {n for n in ways if n.endswith("plain")}


def test_the_best_row_is_found():
    rows = {name: {"lpips": lpips, "psnr": 20.0} for name, lpips in (("a", 0.3), ("b", 0.1), ("c", 0.1), ("d", 0.2))}
    assert best(rows) == "b"
    for row, psnr in zip(rows.values(), (1.0, 2.0, 4.0, 3.0), strict=True):
        row.update(lpips=None, psnr=psnr)
    assert best(rows) == "c"


def test_every_contestant_gets_the_same_condition_and_noise(teacher, clips):
    seen: dict[str, list] = {"a": [], "b": []}

    def sample(name, condition, generator):
        noise = torch.randn(condition["render_latents"].shape, generator=generator)
        seen[name].append((condition, noise))
        return noise

    results = evaluate({name: Contestant(partial(sample, name), 1, 1) for name in seen}, clips, teacher, seed=0)
    for (condition_a, noise_a), (condition_b, noise_b) in zip(seen["a"], seen["b"], strict=True):
        assert condition_a is condition_b and torch.equal(noise_a, noise_b)
    assert not torch.equal(seen["a"][0][1], seen["a"][1][1])  # another clip, another noise
    first = seen["a"][0][1]
    seen["a"].clear()
    evaluate({"a": Contestant(partial(sample, "a"), 1, 1)}, clips[:1], teacher, seed=1)
    assert not torch.equal(seen["a"][0][1], first)

    row = score(results["a"], clips)
    assert (row["steps"], row["nfe"], row["n"]) == (1, 1, 4)
    assert row["seconds_per_clip"] > 0 and len(results["a"].seconds) == 2
    assert row.keys() >= {"psnr", "ssim", "lpips", "fid", "why_null"}
    assert row["lpips"] is None and "smaller than" in row["why_null"]["lpips"]  # clips of 16x24 pixels


def test_the_condition_and_x_T_are_drawn_from_two_streams(teacher, clips):
    """The noise in the render's latents, got back from them, shares no numbers with x_T, in place or out of it."""
    seen = []

    def sample(condition, generator):
        seen.append((condition["render_latents"], teacher.initial_noise(condition, generator)))
        return seen[-1][1]

    evaluate({"a": Contestant(sample, 1, 1)}, clips, teacher, seed=0)
    for clip, (latents, x_T) in zip(clips, seen, strict=True):
        shape = (latents.shape[2], *latents.shape[1:2], *latents.shape[3:])
        mean, one = (teacher.encode_frames(clip.render[None], noise=torch.full(shape, value)) for value in (0.0, 1.0))
        noise = (latents - mean) / (one - mean)
        for a, b in (
            (noise[0].transpose(0, 1).flatten(), x_T.flatten()),
            (noise.flatten().sort()[0], x_T.flatten().sort()[0]),
        ):
            assert not torch.isclose(a, b, atol=1e-3).all()
        assert abs(torch.corrcoef(torch.stack([noise[0].transpose(0, 1).flatten(), x_T.flatten()]))[0, 1]) < 0.2


def test_everybody_pays_for_what_they_wait_for_and_for_nothing_else(teacher, clips, monkeypatch):
    """A device that works when it is waited for, a clock that its work alone moves: 5 s to encode, 2 or 3 to sample,
    7 to decode. The first contestant must not pay for the encoding, nor the second for the first one's decoding."""
    now, pending = [0.0], [0.0]

    def wait_for(device):
        now[0] += pending[0]
        pending[0] = 0.0

    def takes(seconds, value):
        def work(*args):
            pending[0] += seconds
            return value

        return work

    latents = torch.zeros(1, *LATENTS)
    monkeypatch.setattr("fvgen.reports.evaluate.wait_for", wait_for)
    monkeypatch.setattr("fvgen.reports.evaluate.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(teacher, "condition", takes(5.0, None))
    monkeypatch.setattr(teacher, "decode_latents", takes(7.0, clips[0].truth[None]))
    field = {name: Contestant(takes(seconds, latents), 1, 1) for name, seconds in (("a", 2.0), ("b", 3.0))}
    results = evaluate(field, clips, teacher, seed=0)
    for name, seconds in (("a", 2.0), ("b", 3.0)):
        assert results[name].seconds == [{"encode": 5.0, "sample": seconds, "decode": 7.0}] * 2
        row = score(results[name], clips)
        assert row["seconds_per_clip"] == 12 + seconds
        assert (row["encode_seconds"], row["sample_seconds"], row["decode_seconds"]) == (5.0, seconds, 7.0)


def test_a_perfect_contestant_is_as_good_as_the_vae(teacher, clips):
    """What is decoded is what is scored."""

    def sample(condition, generator):
        latents = teacher.encode_frames(clips[0].truth[None], torch.Generator().manual_seed(0))
        decoded.append(teacher.decode_latents(latents)[0])
        return latents

    decoded = []
    results = evaluate({"perfect": Contestant(sample, 1, 1)}, clips[:1], teacher, seed=0)
    assert torch.equal(results["perfect"].videos[0], decoded[0])
    assert score(results["perfect"], clips[:1])["psnr"] == score_videos(decoded, clips[:1])["psnr"]
