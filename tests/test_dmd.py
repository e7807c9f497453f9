"""What one update changes, and what it must leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from small_models import small_teacher
from torch import Tensor, nn

from fvgen.clips.folder import ClipFolder
from fvgen.clips.latents import LatentBatch, load_latents
from fvgen.diffusion.samplers import few_step
from fvgen.diffusion.schedule import trailing_timesteps
from fvgen.distill.draws import Draws
from fvgen.distill.learners import make_learner
from fvgen.distill.methods.base import Part, Setup
from fvgen.distill.methods.dmd import Dmd
from fvgen.objectives.gan import approximate_r1, generator_loss
from fvgen.system.processes import ALONE


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(seed: int = 0) -> Draws:
    return Draws(rng(seed))


@pytest.fixture
def play(stage, clip_folder) -> Callable[..., tuple[Dmd, LatentBatch]]:
    """(a fresh method, a batch of the test clips) of a stage."""

    def make(name: str = "gan", **changes) -> tuple[Dmd, LatentBatch]:
        config, base = stage(name, **changes), small_teacher()
        latents = load_latents(ClipFolder(clip_folder), base)
        learner = partial(make_learner, config, ALONE)
        setup = Setup(config, base.family, base.teacher(getattr(config.method, "guidance", None)), learner)
        return Dmd.build(setup), latents.batch(list(range(config.data.batch_size)))

    return make


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def blind(method: Dmd) -> None:
    """Give the head one opinion of everything."""
    nn.init.zeros_(method.critic.head.layers[-1].weight)


def shout(method: Dmd) -> None:
    """Let the untrained head's logits spread over several units, as a trained one's do."""
    method.critic.head.layers[-1].weight.data *= 30


# --- The student's gradient ---


def test_the_students_gradient_comes_through_the_teachers_features(play):
    method, batch = play()
    shout(method)
    x_0, tau, noise = batch.latents, torch.tensor([300, 700]), torch.randn(batch.latents.shape, generator=rng(1))

    def loss_of(x_0: Tensor) -> Tensor:
        x_tau = method.schedule.add_noise(x_0, noise, tau)
        return generator_loss(method.critic.logits(x_tau, tau, batch.condition)).mean()

    x = x_0.clone().requires_grad_()
    loss_of(x).backward()
    direction = x.grad / x.grad.norm()
    with torch.no_grad():
        slope = (loss_of(x_0 + 0.02 * direction) - loss_of(x_0 - 0.02 * direction)) / 0.04
    assert slope > 1e-3
    torch.testing.assert_close(slope, x.grad.norm(), rtol=0.02, atol=0)


def test_a_blind_head_teaches_the_student_nothing(play):
    method, batch = play()
    blind(method)
    before = weights_of(method.student)
    metrics = method.update_student(method.roll_out(batch, draws()), draws(1))
    assert metrics["grad_norm_student"] == 0
    # AdamW's decay alone: every weight shrinks by the same factor
    optimizer = method.learners["student"].engine.settings
    shrunk = {name: value * (1 - optimizer.lr * optimizer.weight_decay) for name, value in before.items()}
    for name, value in method.student.state_dict().items():
        torch.testing.assert_close(value, shrunk[name])


def test_the_student_fools_a_fixed_head_better_and_better(play):
    method, batch = play(beta1=0.9)
    shout(method)
    losses = [
        method.update_student(method.roll_out(batch, draws()), draws(1))["loss_student_gan"].item() for _ in range(8)
    ]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["gan", "dmd"])
def test_nobody_changes_but_who_learns(play, name):
    method, batch = play(name, r1_weight=0.1)
    networks = {"student": method.student, "head": method.critic.head, "teacher": method.teacher}
    if method.fake_score is not None:
        networks["fake_score"] = method.fake_score
    critics = {"head", "fake_score"} & networks.keys()

    for update, learners in (("update_critics", critics), ("update_student", {"student"})):
        before = {key: weights_of(network) for key, network in networks.items()}
        grads = {key: [p.grad for p in network.parameters()] for key, network in networks.items()}
        getattr(method, update)(method.roll_out(batch, draws()), draws(1))
        changed = {key for key, network in networks.items() if not unchanged(network, before[key])}
        assert changed == learners
        for key in networks.keys() - learners:
            assert all(p.grad is g for p, g in zip(networks[key].parameters(), grads[key], strict=True)), key
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert not any(module.training for network in networks.values() for module in network.modules())


# --- The critics ---


@pytest.mark.parametrize("kind", ["non_saturating", "relativistic"])
def test_the_head_learns_a_fixed_batch(play, kind):
    method, batch = play(gan_kind=kind, head_lr=5e-3, beta1=0.9)
    rollout = method.roll_out(batch, draws())
    rows = [method.update_head(rollout, draws(1)) for _ in range(15)]
    assert rows[-1]["loss_head"] < 0.8 * rows[0]["loss_head"]
    assert rows[-1]["logit_real"] > rows[-1]["logit_fake"] + 0.5
    assert rows[-1]["head_accuracy"] > max(0.6, rows[0]["head_accuracy"])


def test_the_fake_score_learns_a_fixed_batch(play):
    method, batch = play("dmd", beta1=0.9)
    rollout = method.roll_out(batch, draws())
    losses = [method.update_fake_score(rollout, draws(1))["loss_fake_score"].item() for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]


def test_r1_is_nothing_at_identical_logits_and_counts_otherwise(play):
    logits = torch.randn(2, 4, 2, 3, generator=rng())
    assert torch.equal(approximate_r1(logits, logits, 0.05), torch.zeros(2))
    norms = {}
    for weight in (1.0, 1e4):
        method, batch = play(r1_weight=weight)
        metrics = method.update_head(method.roll_out(batch, draws()), draws(1))
        assert metrics["loss_r1"] > 0
        norms[weight] = metrics["grad_norm_head"]
    assert norms[1e4] > 2 * norms[1.0]
    blind(method)
    assert method.update_head(method.roll_out(batch, draws()), draws(1))["loss_r1"] == 0


@pytest.mark.parametrize("parts", [1, 2])
def test_a_skipped_update_of_an_earlier_turn_is_seen(play, parts):
    method, batch = play("dmd", critic_updates=3, accumulation=parts)
    broken = LatentBatch(torch.full_like(batch.latents, torch.nan), batch.condition)
    turns = iter([batch, broken, batch])

    def deal() -> list[Part]:
        clips = next(turns)
        return [Part(clips, draws(part)) for part in range(parts)]

    rows = method.iterate(1, deal)
    seen = {key for row in rows for key, value in row.items() if value is not None and not value.isfinite()}
    assert {"loss_head", "grad_norm_head", "loss_fake_score", "grad_norm_fake_score"} <= seen
    assert not any("student" in key for key in seen) and rows[-1]["grad_norm_student"] > 0
    steps = [learner.engine.state_dict()["step"] for learner in method.learners.values()]
    assert steps == [1, 2, 2]


# --- Distribution matching ---


def test_no_pull_where_student_teacher_and_fake_score_are_one(play):
    method, batch = play("dmd", guidance=1.0, gan_weight=0.0)
    metrics = method.update_student(method.roll_out(batch, draws()), draws(1))
    assert metrics["loss_student_dmd"] < 1e-10 and metrics["grad_norm_student"] < 1e-5


def test_guidance_pulls_the_student_towards_the_guided_teacher(play):
    method, batch = play("dmd", guidance=7.5, gan_weight=0.0, divergence="reverse_kl", student_lr=3e-4)
    rows = [method.update_student(method.roll_out(batch, draws()), draws(1)) for _ in range(5)]
    assert rows[0]["loss_student_dmd"] > 1e-4 and rows[0]["grad_norm_student"] > 1e-4
    rollout = method.roll_out(batch, draws())
    tau, noise = torch.tensor([500, 500]), torch.randn(batch.latents.shape, generator=rng(2))
    untrained, _ = play("dmd", guidance=7.5)
    before = untrained.roll_out(batch, draws()).x0
    with torch.no_grad():
        x_tau = method.schedule.add_noise(before, noise, tau)
        gap = method.teacher(x_tau, tau, batch.condition) - method.fake_score(x_tau, tau, batch.condition)
    moved = (rollout.x0 - before).flatten()
    assert torch.cosine_similarity(moved, gap.flatten(), dim=0) > 0.1


def test_weights_at_micro_batch_one_are_weights(play):
    method, batch = play("dmd", batch_size=1)
    shout(method)
    rows = [method.update_student(method.roll_out(batch, draws(i)), draws(i)) for i in range(6)]
    weights = torch.stack([row["weight"] for row in rows])
    assert weights.max() > 3 * weights.min()
    assert torch.equal(weights, torch.stack([row["weight_max"] for row in rows]))
    # Before anything was seen, the mean is the weight of equals: h(1) = 1/2.
    torch.testing.assert_close(rows[0]["weight"], rows[0]["weight_h"] / 0.5)
    torch.testing.assert_close(rows[0]["weight_h"], torch.sigmoid(-rows[0]["log_ratio"]))


def test_the_weight_scales_the_pull(play):
    losses = {}
    for bias in (-4.0, 4.0):  # r = p/q at the student's samples
        method, batch = play("dmd", gan_weight=0.0)
        blind(method)
        nn.init.constant_(method.critic.head.layers[-1].bias, bias)
        losses[bias] = method.update_student(method.roll_out(batch, draws()), draws(1))
    small, large = losses[4.0], losses[-4.0]
    ratio = large["weight"] / small["weight"]
    torch.testing.assert_close(ratio, torch.tensor(4.0).exp())  # sigmoid(4) / sigmoid(-4)
    torch.testing.assert_close(large["loss_student_dmd"] / small["loss_student_dmd"], ratio**2, rtol=1e-3, atol=0)


def test_a_constant_on_a_relativistic_logit_does_not_weigh(play):
    """The head's loss cannot see it, and the matching loss must not."""
    weights, constants = {}, {}
    for bias in (0.0, 6.0):
        method, batch = play("dmd", gan_kind="relativistic", head_lr=1e-12, ratio_bins=1, ratio_decay=0.5)
        shout(method)
        nn.init.constant_(method.critic.head.layers[-1].bias, bias)
        rollout = method.roll_out(batch, draws())
        for i in range(10):
            method.update_head(rollout, draws(i))
        row = method.update_student(rollout, draws(1))
        weights[bias], constants[bias] = row["weight_h"], row["ratio_constant"]
    torch.testing.assert_close(constants[6.0] - constants[0.0], torch.tensor(6.0), rtol=0, atol=0.05)
    torch.testing.assert_close(weights[6.0], weights[0.0], rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"gan_kind": "relativistic"}, True),
        ({"gan_kind": "non_saturating"}, False),  # its logit is log r
        ({"gan_kind": "relativistic", "divergence": "reverse_kl"}, False),  # no ratio counts
    ],
)
def test_the_constant_is_kept_where_ratios_weigh(play, changes, kept):
    method, batch = play("dmd", **changes)
    method.update_head(method.roll_out(batch, draws()), draws(1))
    assert ("ratio_constant" in method.states) == kept
    if kept:
        assert method.states["ratio_constant"].constant.count_nonzero() > 0


def test_pairs_tell_a_head_that_only_knows_differences(play):
    """Far from 0 half of the logits are wrong by their sign, while every pair is in the right order."""
    method, batch = play(gan_kind="relativistic", head_lr=5e-3, beta1=0.9)
    rollout = method.roll_out(batch, draws())
    rows = [method.update_head(rollout, draws(1)) for _ in range(15)]
    assert set(torch.stack([row["head_pair_accuracy"] for row in rows]).tolist()) <= {0.0, 0.5, 1.0}
    nn.init.constant_(method.critic.head.layers[-1].bias, 50.0)
    shifted = method.update_head(rollout, draws(1))
    assert shifted["head_pair_accuracy"] == rows[-1]["head_pair_accuracy"] == 1
    assert shifted["head_accuracy"] == 0.5 < rows[-1]["head_accuracy"]


def test_reverse_kl_weighs_everything_as_one(play):
    method, batch = play("dmd", divergence="reverse_kl")
    shout(method)
    for i in range(5):
        metrics = method.update_student(method.roll_out(batch, draws(i)), draws(i))
        assert metrics["weight_min"] == metrics["weight_max"] == metrics["weight"] == 1


@pytest.mark.parametrize("kind", ["non_saturating", "relativistic"])
def test_the_students_loss_is_the_weighted_sum(play, kind):
    method, batch = play("dmd", gan_weight=0.5, dmd_weight=3.0, regression_weight=2.0, gan_kind=kind)
    rollout = method.roll_out(batch, draws())
    metrics = method.update_student(rollout, draws(1))
    torch.testing.assert_close(metrics["loss_student_regression"], (rollout.x0 - batch.latents).square().mean())
    parts = ((0.5, "loss_student_gan"), (3.0, "loss_student_dmd"), (2.0, "loss_student_regression"))
    torch.testing.assert_close(metrics["loss_student"], sum(weight * metrics[name] for weight, name in parts))


# --- What the student starts from ---


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_noised_input_is_a_real_clip_at_one_of_the_students_timesteps(play, steps):
    method, batch = play(student_steps=steps, batch_size=5)
    x_t, t = method.noised_input(batch, draws())
    assert set(t.tolist()) <= set(trailing_timesteps(steps))
    if steps == 4:
        assert len(set(t.tolist())) > 1  # drawn per sample
    noise = (x_t - method.schedule.add_noise(batch.latents, torch.zeros(()), t)) / method.schedule.sigma[t].reshape(
        -1, 1, 1, 1, 1
    )
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_simulated_input_is_where_the_sampler_would_be(play, steps):
    method, batch = play(student_steps=steps, student_input="simulated")
    ladder = trailing_timesteps(steps)[::-1]
    seen = set()
    for seed in range(12):
        calls = []
        hook = method.student.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[1].tolist()))
        x_t, t = method.simulated_input(batch, draws(seed))
        hook.remove()
        stop = ladder.index(t[0].item())
        assert t.tolist() == [ladder[stop]] * 2 and not x_t.requires_grad
        assert calls == [[value] * 2 for value in ladder[:stop]]
        seen.add(ladder[stop])

        generator = rng(seed)
        torch.randint(steps, (), generator=generator)
        states = [torch.randn(batch.latents.shape, generator=generator)]
        with torch.no_grad():
            few_step(
                lambda x, t: method.student(x, t, batch.condition),
                states[0],
                method.schedule,
                steps,
                generator=generator,
                on_step=lambda step, states=states: states.append(step.x),
            )
        torch.testing.assert_close(x_t, states[stop])
    assert seen == set(ladder) if steps < 8 else len(seen) > 4


@pytest.mark.parametrize("student_input", ["noised", "simulated"])
def test_random_numbers_do_not_depend_on_who_learns(play, student_input):
    method, batch = play(student_input=student_input)
    first, second = draws(), draws()
    with torch.no_grad():
        silent = method.roll_out(batch, first)
    learning = method.roll_out(batch, second)
    assert torch.equal(silent.x0, learning.x0) and learning.x0.requires_grad and not silent.x0.requires_grad
    assert torch.equal(first.generator.get_state(), second.generator.get_state())
