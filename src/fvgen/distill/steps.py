"""One function per update: student, critics. All randomness comes from the generator that is passed in.

Symbols follow FVGen, algorithm 1: t is one of the student's own timesteps, tau the timestep at which its output and the
real clip are noised again for the critics (same noise, same tau for both). Latents are [B, 4, F, h, w].
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fvgen.data.latents import LatentBatch
from fvgen.distill.config import StageConfig
from fvgen.distill.engines import PlainEngine
from fvgen.models.discriminator import DiscriminatorHead, logits_of
from fvgen.models.teacher import Denoiser, Teacher
from fvgen.objectives import divergences
from fvgen.objectives.dmd import denoising_loss, dmd_gradient, dmd_loss
from fvgen.objectives.gan import approximate_r1, discriminator_loss, generator_loss
from fvgen.objectives.ratio import RatioNormalizer, log_ratio
from fvgen.schedule import NoiseSchedule, trailing_timesteps

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Players:
    """Everybody who takes part. ``fake_score`` and ``normalizer`` are None in stage "gan"."""

    teacher: Teacher
    student: Denoiser
    head: DiscriminatorHead
    fake_score: Denoiser | None
    normalizer: RatioNormalizer | None
    student_engine: PlainEngine
    head_engine: PlainEngine
    fake_score_engine: PlainEngine | None

    @property
    def schedule(self) -> NoiseSchedule:
        return self.teacher.schedule


@dataclass(frozen=True)
class Rollout:
    """The student's answer to one batch: ``x0`` carries a graph if the student is to learn from it."""

    batch: LatentBatch
    x0: Tensor


def roll_out(players: Players, config: StageConfig, batch: LatentBatch, generator: torch.Generator) -> Rollout:
    """The student denoises one of its timesteps; under `torch.no_grad` for the critics alone."""
    make_input = {"noised": noised_input, "simulated": simulated_input}[config.student_input]
    x_t, t = make_input(players, config, batch, generator)
    return Rollout(batch, players.student(x_t, t, batch.condition))


def noised_input(
    players: Players, config: StageConfig, batch: LatentBatch, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A real clip noised to one of the student's timesteps, drawn per sample (algorithm 1, lines 4 and 5)."""
    timesteps = torch.tensor(trailing_timesteps(config.student_steps))
    size = batch.latents.shape[0]
    t = timesteps[torch.randint(len(timesteps), (size,), generator=generator)].to(batch.latents.device)
    return players.schedule.add_noise(batch.latents, _normal(batch.latents, generator), t), t


@torch.no_grad()
def simulated_input(
    players: Players, config: StageConfig, batch: LatentBatch, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The student's own sampling from pure noise down to a random timestep (DMD2, section 4.5), one for the batch."""
    timesteps = trailing_timesteps(config.student_steps)[::-1]
    stop = int(torch.randint(len(timesteps), (), generator=generator))
    x_t = _normal(batch.latents, generator)
    for t, t_next in pairwise(timesteps[: stop + 1]):
        x0 = players.student(x_t, _full(t, x_t), batch.condition)
        x_t = players.schedule.add_noise(x0, _normal(x0, generator), t_next)
    return x_t, _full(timesteps[stop], x_t)


def update_critics(players: Players, config: StageConfig, rollout: Rollout, generator: torch.Generator) -> Metrics:
    """The head learns to tell real from student (Eq. 5), the fake score to denoise the student's output (Eq. 2)."""
    metrics = update_head(players, config, rollout, generator)
    if players.fake_score is not None:
        metrics |= update_fake_score(players, rollout, generator)
    return metrics


def update_head(players: Players, config: StageConfig, rollout: Rollout, generator: torch.Generator) -> Metrics:
    """One step of the discriminator head on features of the frozen teacher."""
    batch, fake = rollout.batch, rollout.x0.detach()
    tau = _random_timesteps(config, fake, generator)
    noise = _normal(fake, generator)
    real_tau, fake_tau = (players.schedule.add_noise(x0, noise, tau) for x0 in (batch.latents, fake))
    with torch.no_grad():
        real_features, fake_features = (players.teacher.features(x, tau, batch.condition) for x in (real_tau, fake_tau))
    real_logits, fake_logits = players.head(real_features), players.head(fake_features)
    loss = discriminator_loss(real_logits, fake_logits, config.gan_kind).mean()
    metrics = {"loss_head": loss}
    if config.r1_weight > 0:
        with torch.no_grad():
            shaken = real_tau + config.r1_sigma * _normal(fake, generator)
            shaken_features = players.teacher.features(shaken, tau, batch.condition)
        penalty = approximate_r1(real_logits, players.head(shaken_features), config.r1_sigma).mean()
        loss = loss + config.r1_weight * penalty
        metrics["loss_r1"] = penalty
    norm = players.head_engine.update(loss)
    right = torch.cat([real_logits > 0, fake_logits < 0]).float().mean()
    logits = {"logit_real": real_logits.mean(), "logit_fake": fake_logits.mean()}
    return metrics | logits | {"head_accuracy": right, "grad_norm_head": norm}


def update_fake_score(players: Players, rollout: Rollout, generator: torch.Generator) -> Metrics:
    """One denoising step on the student's output, in the network's own v-parameterisation, t uniform in 0..999."""
    x0 = rollout.x0.detach()
    t = torch.randint(1000, (x0.shape[0],), generator=generator).to(x0.device)
    noise = _normal(x0, generator)
    prediction = players.fake_score.velocity(players.schedule.add_noise(x0, noise, t), t, rollout.batch.condition)
    loss = denoising_loss(prediction, players.schedule.velocity(x0, noise, t)).mean()
    norm = players.fake_score_engine.update(loss)
    return {"loss_fake_score": loss, "grad_norm_fake_score": norm}


def update_student(players: Players, config: StageConfig, rollout: Rollout, generator: torch.Generator) -> Metrics:
    """One step of the student: adversarial loss, and in stage "dmd" the weighted distribution-matching loss (Eq. 8).

    Both look at the same noised output, so that the logits that drive the one are the density ratio of the other.
    """
    condition, x0 = rollout.batch.condition, rollout.x0
    tau = _random_timesteps(config, x0, generator)
    noise = _normal(x0, generator)
    x_tau = players.schedule.add_noise(x0, noise, tau)
    logits = logits_of(players.head, players.teacher, x_tau, tau, condition)
    real_logits = None
    if config.gan_kind == "relativistic":
        with torch.no_grad():
            real_tau = players.schedule.add_noise(rollout.batch.latents, noise, tau)
            real_logits = logits_of(players.head, players.teacher, real_tau, tau, condition)

    adversarial = generator_loss(logits, real_logits, config.gan_kind).mean()
    loss = config.gan_weight * adversarial
    metrics = {"loss_student_gan": adversarial, "student_std": x0.detach().std()}
    if config.regression_weight > 0:
        regression = (x0 - rollout.batch.latents).square().mean()
        loss = loss + config.regression_weight * regression
        metrics["loss_student_regression"] = regression
    if players.fake_score is not None:
        matching, ratio_metrics = matching_loss(players, config, rollout, x_tau.detach(), tau, logits)
        loss = loss + config.dmd_weight * matching
        metrics |= {"loss_student_dmd": matching} | ratio_metrics
    norm = players.student_engine.update(loss)
    return metrics | {"loss_student": loss, "grad_norm_student": norm}


def matching_loss(
    players: Players, config: StageConfig, rollout: Rollout, x_tau: Tensor, tau: Tensor, logits: Tensor
) -> tuple[Tensor, Metrics]:
    """The DMD surrogate loss (scalar) on the student's output, weighted by the divergence's h(r)."""
    condition = rollout.batch.condition
    with torch.no_grad():
        x0_real = players.teacher(x_tau, tau, condition)
        x0_fake = players.fake_score(x_tau, tau, condition)
    ratio = log_ratio(logits)
    h = divergences.weight(config.divergence, ratio)
    weight = players.normalizer.normalize(h, tau)
    loss = dmd_loss(rollout.x0, dmd_gradient(rollout.x0, x0_real, x0_fake, weight)).mean()
    ratios = {"log_ratio": ratio.mean(), "log_ratio_max": ratio.abs().max()}
    weights = {"weight_h": h.mean(), "weight": weight.mean(), "weight_min": weight.min(), "weight_max": weight.max()}
    return loss, ratios | weights


def _random_timesteps(config: StageConfig, like: Tensor, generator: torch.Generator) -> Tensor:
    t = torch.randint(config.t_min, config.t_max + 1, (like.shape[0],), generator=generator)
    return t.to(like.device)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device)


def _full(t: int, like: Tensor) -> Tensor:
    return torch.full((like.shape[0],), t, dtype=torch.long, device=like.device)
