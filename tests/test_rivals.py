"""The rivals of FVGen and the controls: what sets each apart from `dmd`, and their files."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from small_models import small_teacher
from torch import Tensor, nn

from fvgen import distill
from fvgen.clips.folder import ClipFolder
from fvgen.clips.latents import LatentBatch, load_latents
from fvgen.diffusion.samplers import ddim
from fvgen.diffusion.schedule import NoiseSchedule, trailing_timesteps
from fvgen.distill.draws import Draws
from fvgen.distill.learners import make_learner
from fvgen.distill.methods import METHODS
from fvgen.distill.methods.base import Method, Setup
from fvgen.distill.methods.dmd import MORE_OF_HEAD
from fvgen.distill.methods.regression import Consistency, ConsistencySettings
from fvgen.errors import UserError
from fvgen.pipelines import FVGenPipeline
from fvgen.pipelines.folders import load_pipeline
from fvgen.system.processes import ALONE

RIVALS = REPOSITORY / "recipes" / "configs" / "rivals"
ADVERSARIAL = {"head_channels": 8, "head_lr": 1e-3, "critic_updates": 1}
OF = {
    "gan": ADVERSARIAL,
    "dmd": ADVERSARIAL | {"fake_score_lr": 1e-3},
    "dmd2": ADVERSARIAL | {"fake_score_lr": 1e-3, "critic_updates": 2},
    "f-distill": ADVERSARIAL | {"fake_score_lr": 1e-3, "divergence": "jensen_shannon"},
    "data-forcing": {"gan_weight": 0.0, "divergence": "reverse_kl", "fake_score_lr": 1e-3, "critic_updates": 1},
    "ode-pairs": {"student_steps": 2, "ode_steps": 4},
    "consistency": {"grid": 4},
    "control-random-gradient": ADVERSARIAL,
    "control-frozen-head": ADVERSARIAL,
}


def draws(seed: int = 0) -> Draws:
    return Draws(torch.Generator().manual_seed(seed))


@pytest.fixture
def config(teacher_folder, clip_folder, tmp_path) -> Callable[..., distill.StageConfig]:
    def make(name: str, **changes) -> distill.StageConfig:
        common = {"teacher": str(teacher_folder), "data": str(clip_folder), "out": str(tmp_path / name)}
        common |= {"iterations": 2, "batch_size": 2, "student_lr": 1e-3, "sample_every": 0, "track": False}
        return distill.stage_config(name, {**common, **OF[name], **changes})

    return make


@pytest.fixture
def play(config, clip_folder) -> Callable[..., tuple[Method, LatentBatch]]:
    """(a fresh method, a batch of the test clips)."""

    def make(name: str, **changes) -> tuple[Method, LatentBatch]:
        settings, base = config(name, **changes), small_teacher()
        latents = load_latents(ClipFolder(clip_folder), base)
        teacher = base.teacher(getattr(settings.method, "guidance", None))
        method = METHODS[name].method.build(
            Setup(settings, base.family, teacher, partial(make_learner, settings, ALONE))
        )
        return method, latents.batch([0, 1])

    return make


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def same(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"gan", "dmd", "leap", "camera", "lalrm"}))
def test_every_row_trains_resumes_and_leaves_a_student(config, name, tmp_path):
    whole, cut = config(name), config(name, out=str(tmp_path / "cut"))
    student = distill.run(whole)
    distill.run(distill.changed(cut, iterations=1))
    distill.run(cut)  # goes on
    assert distill.read_metrics(whole.run.out) == distill.read_metrics(cut.run.out)
    teacher, made = small_teacher().network, load_pipeline(student, FVGenPipeline)
    assert made.config.steps == whole.method.student_steps
    assert not same(made.network, weights_of(teacher))


# --- DMD2 ---


def test_dmd2_sees_the_fake_score_and_teaches_it(play):
    method, batch = play("dmd2")
    assert method.critic.source is method.fake_score
    with torch.no_grad():
        rollout = method.roll_out(batch, draws())
    loss, metrics = method.more_of_fake_score(rollout, draws(1))
    assert loss.item() == pytest.approx(method.settings.feature_weight * metrics["loss_features"].item())
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in method.fake_score.parameters())
    assert all(p.grad is None for p in method.critic.head.parameters())
    with torch.no_grad():
        before = method.look(rollout, draws(2)).features[0]
        next(method.fake_score.parameters()).mul_(1.5)
        after = method.look(rollout, draws(2)).features[0]
    assert not torch.equal(before, after)


def test_the_batchs_own_mean_makes_one_of_a_lone_clips_weight(play):
    """What f-distill's normaliser does at micro-batch 1: any divergence becomes reverse KL."""
    method, batch = play("f-distill", batch_size=1)
    one = LatentBatch(batch.latents[:1], batch.condition.rows([0]))
    nn.init.normal_(method.critic.head.layers[-1].weight)
    metrics = method.update_student(method.roll_out(one, draws()), draws(1))
    assert metrics["weight_h"] != 1 and metrics["weight"] == 1


# --- Data forcing ---


def test_data_forcing_is_dmd_at_weight_zero_and_looks_at_real_clips_at_one(play):
    method, batch = play("data-forcing", data_weight=0.0, guidance=1.0, t_max=399)
    rollout = method.roll_out(batch, draws())
    seen = method.look(rollout, draws(1))
    assert torch.equal(method.real_estimate(rollout, seen), seen.x0_real)
    method.settings = method.settings.model_copy(update={"data_weight": 1.0})
    found = method.real_estimate(rollout, seen)
    x_tau = method.schedule.add_noise(batch.latents, seen.noise, seen.tau)
    torch.testing.assert_close(found, method.teacher(x_tau, seen.tau, batch.condition), rtol=0, atol=1e-4)


# --- Controls ---


def test_the_random_direction_has_the_gradients_norm_clip_by_clip(play):
    method, batch = play("control-random-gradient")
    nn.init.normal_(method.critic.head.layers[-1].weight)
    x0 = batch.latents.clone().requires_grad_()
    weights = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    adversarial = (x0.square() * weights).mean()
    expected = method.gan_gradient(adversarial, x0)
    (found,) = torch.autograd.grad(method.adversarial_step(adversarial, x0, draws()), x0)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), expected.flatten(1).norm(dim=1))
    cosine = torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    assert cosine.abs() < 5 / x0.numel() ** 0.5  # five standard deviations of a random direction's


def test_a_frozen_head_stays(play):
    method, batch = play("control-frozen-head")
    before = weights_of(method.critic.head)
    metrics = method.update_critics(method.roll_out(batch, draws()), draws(1))
    assert same(method.critic.head, before) and metrics["loss_head"] > 0


# --- Settings of `dmd` ---


def test_a_balanced_gradient_has_entries_of_one_in_the_mean(play):
    method, batch = play("gan", balance=True)
    x0 = batch.latents.clone().requires_grad_()
    for size in (1e-4, 10.0):
        adversarial = size * x0.pow(3).mean()
        (found,) = torch.autograd.grad(method.adversarial_step(adversarial, x0, draws()), x0)
        assert found.abs().mean().item() * x0.numel() == pytest.approx(1, rel=1e-4)
        assert torch.equal(found.sign(), x0.detach().square().sign())


def test_a_head_below_its_floor_learns_again(play):
    steps = []
    for floor in (0.0, 0.999):
        method, batch = play("gan", head_pair_floor=floor, gan_kind="relativistic", head_lr=1e-12)
        learn = method.learn
        method.learn = lambda name, loss, learn=learn: steps.append(floor) or learn(name, loss)  # noqa: B023
        method.update_critics(method.roll_out(batch, draws()), draws(1))
    assert steps.count(0.0) == 1 and 1 < steps.count(0.999) <= 1 + MORE_OF_HEAD


def test_the_fake_score_starts_as_the_earlier_stages_student(config, tmp_path):
    first = config("gan")
    student = load_pipeline(distill.run(first), FVGenPipeline).network.state_dict()
    for start, as_student in (("teacher", False), ("student", True)):
        settings = config("dmd", init=first.run.out, fake_score_start=start, out=str(tmp_path / start))
        method = distill.Trainer(settings).method
        found = {name.removeprefix("network."): x for name, x in method.fake_score.state_dict().items()}
        assert all(torch.equal(student[name], found[name]) for name in student) == as_student


@pytest.mark.parametrize("student_input", ["noised", "simulated"])
def test_any_step_students_learn_every_count_as_often(play, student_input):
    """Their timesteps by count: 1 sees 999 alone, 2 half as often 499, ..."""
    method, batch = play("dmd", any_step=True, student_input=student_input)
    make = {"noised": method.noised_input, "simulated": method.simulated_input}[student_input]
    method.learners["student"].module.forward = lambda x_t, t, condition: x_t  # the draws alone matter
    stream, seen = draws(), Counter()
    for _ in range(400):
        seen.update(make(batch, stream)[1].tolist())
    chance = Counter()
    for count in (1, 2, 4, 8):
        chance.update({t: 1 / (4 * count) for t in trailing_timesteps(count)})
    assert seen.keys() == chance.keys()
    # Draws: 800 clips of one each, or 400 that two clips share. Five standard deviations of a binomial.
    each = 1 if student_input == "noised" else 2
    for t, p in chance.items():
        assert abs(seen[t] / 800 - p) < 5 * (p * (1 - p) * each / 800) ** 0.5


def test_both_gradients_sizes_are_told(config):
    settings = config("dmd")
    distill.run(settings)
    rows = [json.loads(line) for line in Path(settings.run.out, "monitor.jsonl").read_text().splitlines()]
    assert all(row["gradient_gan"] > 0 and row["gradient_dmd"] > 0 for row in rows)


# --- From the teacher alone ---


def test_ode_pairs_lie_on_one_way_of_the_teachers(play):
    method, batch = play("ode-pairs")
    x_T = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(3))
    points, end = method.trajectory(batch.condition, x_T)
    steps = trailing_timesteps(4)
    assert sorted(points) == trailing_timesteps(2) and torch.equal(points[999], x_T)
    denoise = lambda x, t: method.teacher(x, t, batch.condition)  # noqa: E731
    with torch.no_grad():
        rest = ddim(denoise, points[499], method.teacher.schedule, steps[:2], denoise_last=True)
    torch.testing.assert_close(rest, end)


class Exact(nn.Module):
    """The denoiser of a world of one clip: all zeros but for ``c``."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c))
        self.schedule = NoiseSchedule.lvdm(0.7)

    def forward(self, x_t: Tensor, t: Tensor, condition: object) -> Tensor:
        return self.c.expand_as(x_t)


def test_consistency_asks_nothing_of_who_knows_the_world(config):
    """Its solution in closed form: all points of all trajectories end in the one clip."""
    settings = config("consistency")
    batch = LatentBatch(torch.full((3, 4, 2, 4, 4), 0.5), {})
    for c, expected in ((0.5, 0.0), (0.0, 0.25)):
        student = make_learner(settings, ALONE, "student", Exact(c))
        method = Consistency(ConsistencySettings(grid=1), Exact(0.5), student)
        assert method.loss(batch, draws()).item() == pytest.approx(expected, abs=1e-12)


def test_the_target_lags_behind(config, play):
    method, batch = play("consistency", target_decay=0.75)
    before = [p.clone() for p in method.target.parameters()]
    method.iterate(1, lambda: [(batch, draws())])
    for old, now, target in zip(before, method.student.parameters(), method.target.parameters(), strict=True):
        torch.testing.assert_close(target, old + 0.25 * (now - old))


# --- Files ---


@pytest.mark.parametrize("file", sorted(RIVALS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_file_is_whole(file, tmp_path):
    stages = distill.read_stages(file, [f"out={tmp_path}", "seed=3"])
    assert sum(stage.run.iterations for stage in stages) == 120  # equal work
    assert all(stage.run.seed == 3 and stage.method.student_steps == 4 for stage in stages)
    for before, after in pairwise(stages):
        assert after.run.init == before.run.out
    assert [stage.name for stage in stages] == yaml.safe_load(file.read_text())["stages"]


def test_words_reach_the_stages_that_know_them(tmp_path):
    out = f"out={tmp_path}"
    gan, dmd = distill.read_stages(RIVALS / "fvgen.yaml", [out, "dmd.iterations=7", "dmd.guidance=2"])
    assert (gan.run.iterations, dmd.run.iterations, dmd.method.guidance) == (80, 7, 2.0)
    for words, told in (
        (["nonsense=1"], "unknown setting 'nonsense'"),
        ([], "out is not given"),
    ):
        with pytest.raises(UserError, match=told):
            distill.read_stages(RIVALS / "fvgen.yaml", [*words, *([out] if words else [])])
    alone = tmp_path / "alone.yaml"
    alone.write_text("stages: gan\n")
    with pytest.raises(UserError, match="write the methods in order"):
        distill.read_stages(alone, [out])


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("dmd", {"fake_score_start": "student"}, "needs init="),
        ("gan", {"fake_score_start": "student"}, "no effect"),
        ("gan", {"gan_weight": 0.0, "regression_weight": 1.0, "head_channels": None, "balance": True}, "no effect"),
        ("dmd2", {"gan_weight": 0.0, "divergence": "reverse_kl"}, "must both be above 0"),
        ("ode-pairs", {"ode_steps": 5}, "give a multiple"),
        ("f-distill", {"ratio_norm": "running"}, "remove ratio_norm"),
        ("consistency", {"deepspeed": "zero2.json"}, "leave deepspeed out"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(config, name, settings, told):
    dropped = {key for key, value in settings.items() if value is None}
    given = {**{key: value for key, value in OF[name].items() if key not in dropped and "head" not in key}, **settings}
    words = {key: value for key, value in given.items() if value is not None}
    with pytest.raises(UserError, match=told):
        distill.stage_config(name, {"out": "x", "student_lr": 1e-3, **words})


@pytest.mark.parametrize("shift", [0.25, 1.0, 4.0])
def test_the_shift_of_tau_has_the_stated_distribution(play, shift):
    """P(u' <= x) for uniform u and u' = s u / (1 + (s - 1) u) is x / (s - (s - 1) x), within four standard errors."""
    method, _ = play("gan", t_min=100, t_max=900, tau_shift=shift)
    count = 20_000
    tau = method.draw_tau(torch.zeros(count), draws())
    assert tau.min() >= 100 and tau.max() <= 900
    for share in (0.2, 0.5, 0.8):
        expected = share / (shift - (shift - 1) * share)
        found = (tau <= 100 + 800 * share).double().mean().item()
        assert abs(found - expected) < 4 * (expected * (1 - expected) / count) ** 0.5 + shift / 800


def test_no_shift_draws_what_was_drawn_before(play):
    method, _ = play("gan", t_min=20, t_max=399)
    assert torch.equal(method.draw_tau(torch.zeros(64), draws()), draws().integers(20, 400, torch.zeros(64)))
