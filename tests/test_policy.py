"""DDPNet and its losses: in a world whose best arm is known, and on a finished student."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from checks import refusal
from torch import Tensor
from typer.testing import CliRunner

from fvgen import distill
from fvgen.cli import app
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill.policy import REPORT, FitSettings, fit_policy, refit, report_of, rewards_of
from fvgen.models.policy import ARMS, DDPNet
from fvgen.models.viewcrafter.leap import FVGenLeapPipeline
from fvgen.objectives.policy import entropy_of, full_information, reinforce
from fvgen.pipelines.folders import load_pipeline

SCHEDULE = NoiseSchedule.cogvideox()
BANDS = ((1.5, 0.3), (0.25, 0.9))  # standard deviations of the data and of the render's error, half of the entries each
ERRORS = [0.583, 0.522, 0.564, 0.670, 0.832, 1.046, 1.314, 1.633, 1.998, 2.397]  # of the leap at 59, 119, ... 599


def errors_in(bands: tuple[tuple[float, float], ...], exact: bool = True) -> Tensor:
    """[K] the mean squared error of a leap through the exact consistency function, by the formula."""
    ab = SCHEDULE.alphas_cumprod.double()[list(ARMS)]
    a, found = ab.sqrt(), 0
    for s, b in bands:
        c = s / (ab * s**2 + 1 - ab).sqrt()
        found = found + ((c * a - 1) ** 2 * s**2 + c**2 * (a**2 * b**2 + 1 - ab)) / len(bands)
    return found


def world(clips: int, seed: int = 0, bands: tuple[tuple[float, float], ...] = BANDS) -> tuple[Tensor, Tensor]:
    """Renders and truths [N, 4, 2, 16, 16]; the bands are the two halves of the channels."""
    truth, error = torch.randn(2, clips, 4, 2, 16, 16, generator=torch.Generator().manual_seed(seed))
    for band, (s, b) in enumerate(bands):
        part = slice(2 * band, 2 * band + 2)
        truth[:, part] *= s
        error[:, part] *= b
    return truth + error, truth


def exact(x_t: Tensor, t: Tensor, bands: tuple[tuple[float, float], ...] = BANDS) -> Tensor:
    """The consistency function of each band."""
    ab = SCHEDULE.alphas_cumprod[t].view(-1, 1, 1, 1, 1)
    return torch.cat(
        [part * s / (ab * s**2 + 1 - ab).sqrt() for part, (s, _) in zip(x_t.chunk(2, dim=1), bands, strict=True)], dim=1
    )


@pytest.fixture(scope="module")
def table() -> tuple[Tensor, Tensor]:
    """(starts, rewards [N, K]) of 96 clips."""
    start, truth = world(96)
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(9))
    return start, rewards_of(exact, SCHEDULE, start, truth, noise, ARMS)


def test_the_table_is_the_formulas(table):
    _, rewards = table
    assert [round(2 * error, 3) for error in errors_in(BANDS).tolist()] == ERRORS  # of both bands together
    per_clip = rewards.std(0) / len(rewards) ** 0.5
    assert ((rewards.mean(0) + errors_in(BANDS)).abs() < 5 * per_clip).all()


@pytest.mark.parametrize("method", ["full", "reinforce"])
def test_it_finds_the_best_arm_and_with_a_flipped_sign_the_worst(table, method):
    starts, rewards = table
    for sign, best in ((1, 119), (-1, 599)):
        policy = fit_policy(starts, sign * rewards, ARMS, FitSettings(method, iterations=150, lr=3e-3))
        assert set(policy.choose(world(32, seed=5)[0]).tolist()) == {best}


def test_it_tells_clips_apart():
    """Renders without error want to stay, those of another kind to leave: what no constant arm can give."""
    kinds = (((3.0, 0.05), (1.0, 0.05)), ((0.3, 0.5), (0.3, 1.5)))  # they differ in shape: norms take scale away
    starts, rewards = [], []
    for seed, bands in enumerate(kinds):
        start, truth = world(60, seed, bands)
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        denoise = lambda x_t, t, bands=bands: exact(x_t, t, bands)  # noqa: E731
        starts.append(start)
        rewards.append(rewards_of(denoise, SCHEDULE, start, truth, noise, ARMS))
    wanted = [ARMS[int(errors_in(bands).argmin())] for bands in kinds]
    assert wanted[0] == 59 and wanted[1] == 599
    starts, rewards = torch.cat(starts), torch.cat(rewards)
    learnt = torch.arange(len(starts)) % 5 != 4
    policy = fit_policy(starts[learnt], rewards[learnt], ARMS, FitSettings(iterations=300))
    for bands, t in zip(kinds, wanted, strict=True):
        assert set(policy.choose(world(8, 7, bands)[0]).tolist()) == {t}
    report = report_of(policy, starts, rewards, learnt)
    held_out = report["held_out"]
    assert held_out["policy"] > held_out["best_constant"] + 0.05 and held_out["policy"] <= held_out["oracle"] + 1e-6
    assert held_out["histogram"] == {str(t): 12 for t in wanted} and held_out["clips"] == 24


def test_full_information_is_the_mean_of_reinforce():
    logits, rewards = torch.randn(1, 4), torch.randn(1, 4)
    logits.requires_grad_()
    (expected,) = torch.autograd.grad(full_information(logits, rewards).sum(), logits)
    pi, found = logits.detach().softmax(1), 0
    for arm in range(4):
        loss = reinforce(logits, torch.tensor([arm]), rewards[:, arm], baseline=3.0)
        found = found + pi[0, arm] * torch.autograd.grad(loss.sum(), logits)[0]
    torch.testing.assert_close(found, expected)
    assert entropy_of(torch.zeros(1, 4)).item() == pytest.approx(torch.tensor(4.0).log().item())
    lower = full_information(torch.zeros(1, 4), torch.zeros(1, 4), entropy=0.5)
    assert lower.item() == pytest.approx(-0.5 * torch.tensor(4.0).log().item())


def test_the_network():
    policy = DDPNet(16)
    assert [tuple(m.weight.shape[:2]) for m in policy.layers if isinstance(m, torch.nn.Conv2d)] == [
        (32, 16), (64, 32), (96, 64), (128, 96)
    ]  # fmt: skip
    clips = torch.randn(2, 16, 3, 12, 16)
    logits = policy(clips)
    assert logits.shape == (2, 10)
    torch.testing.assert_close(policy(clips.flip(2)), logits)  # frames are averaged
    torch.testing.assert_close(policy(clips[1:]), logits[1:])
    assert set(policy.choose(clips).tolist()) <= set(ARMS)
    assert policy(torch.randn(1, 16, 13, 60, 90)).shape == (1, 10)


# --- A finished student ---


@pytest.fixture(scope="module")
def leap_run(teacher_folder, clip_folder, tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("runs") / "leap")
    words = {"teacher": str(teacher_folder), "data": str(clip_folder), "iterations": 1, "batch_size": 2}
    distill.run(distill.stage_config("leap", {"out": out, "track": False, "sample_every": 0, "t_max": 499, **words}))
    return out


def test_a_run_gets_a_policy(leap_run, clip_folder, tmp_path):
    out = tmp_path / "with"
    words = ["policy", leap_run, "--data", str(clip_folder), "--out", str(out), "--iterations", "20"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    assert "learnt: policy -" in said.output and "clips by t:" in said.output and f"Student: {out}" in said.output
    student = load_pipeline(out, FVGenLeapPipeline)
    report = json.loads((out / REPORT).read_text())
    assert student.policy.config.arms == report["arms"] == [arm for arm in ARMS if arm <= 499]
    assert report["learnt"]["clips"] == 4 and report["held_out"]["clips"] == 1
    assert sum(report["learnt"]["histogram"].values()) == 4
    render = torch.rand(2, 4, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    student.set_progress_bar_config(disable=True)
    generator = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    start = student.family.start(student.condition(render, generator()))
    chosen = student.timesteps_of(start)
    assert torch.equal(chosen, student.policy.choose(start))
    if len(set(chosen.tolist())) == 1:
        assert torch.equal(student(render, generator()), student(render, generator(), t=int(chosen[0])))
    assert student.timesteps_of(start, 59).tolist() == [59, 59]

    again, _ = refit(out, str(clip_folder), tmp_path / "again", FitSettings("reinforce", 5))  # any student's folder
    assert load_pipeline(again, FVGenLeapPipeline).policy is not None


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda run, data: refit(run, "nowhere"), "data folder nowhere does not exist"),
        (lambda run, data: refit(f"{run}/student"), "is no run's folder; say what to learn from with --data"),
        (lambda run, data: refit(f"{run}/student", data), "is no run's folder; say where to write with --out"),
        (lambda run, data: refit(data, data, f"{run}-out"), "is no model folder"),
        (lambda run, data: refit("tiny", data, f"{run}-out"), "but a LeapPipeline is needed here"),
        (lambda run, data: refit(run, clips=3), "holds 3 clips; a policy needs at least 5"),
    ],
)
def test_what_cannot_be_refitted(leap_run, clip_folder, make: Callable[[str, str], object], told):
    assert told in refusal(lambda: make(leap_run, str(clip_folder)))


def test_a_method_that_there_is_not(leap_run):
    said = CliRunner().invoke(app, ["policy", leap_run, "--method", "reinforced"])
    assert said.exit_code == 2


def test_lpips_counts_where_it_is_asked_for(table):
    from fvgen.metrics.image import lpips

    try:
        lpips(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    except Exception as error:
        pytest.skip(str(error))
    start, truth = world(2)
    decode = lambda latents: latents[:, :3].transpose(1, 2).repeat(1, 1, 1, 2, 2).sigmoid()  # noqa: E731
    found = [
        rewards_of(exact, SCHEDULE, start, truth, torch.zeros_like(start), (59, 599), decode, w) for w in (0, 1, 2)
    ]
    assert (found[1] < found[0]).all()
    torch.testing.assert_close(found[2] - found[0], 2 * (found[1] - found[0]))
