"""One function per update: student, critics. All randomness comes from the `Draws` that are passed in.

Symbols follow FVGen, algorithm 1: t is one of the student's own timesteps, tau the timestep at which its output and the
real clip are noised again for the critics (same noise, same tau for both). Latents are [B, 4, F, h, w].

What an iteration with one critic update costs, in passes of the UNet over B clips (forward; with a graph; backward),
h being the part of the UNet up to the tap (about half of it), and why not fewer:

    rollout          1, with a graph   one for head, fake score and student: the student does not move in between
    head             2 h               features of the real and of the student's clip, at one tau with one noise
    fake score       1 and backward    its own draw of t, as its own loss needs it: no other pass sees this input
    student: critic  1 + backward h    the teacher's conditional pass is both feature extractor and real score; its
                                       graph ends at the tap, whose backward needs no weight gradients
    student: scores  1 or 2            the fake score at the same place; the unconditional teacher where guidance is on
    student          backward          one for the sum of all its losses

The head sees the student's clip at one tau and the student is judged at another, so as not to be judged where the head
has just been fitted; ``same_noise=true`` (algorithm 1 as printed: one tau and noise for both) makes them one pass and
saves h. Below that nothing can be shared: what remains are different networks, or one network at different inputs. Each
further critic update costs 1 + 2 h and the fake score's pass. With ``accumulation`` above 1 the student's rollout is
computed again for its own update, for keeping all parts' graphs would keep the memory that accumulation is to save.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fvgen.diffusion.schedule import NoiseSchedule, trailing_timesteps
from fvgen.distill.config import StageConfig
from fvgen.distill.draws import Draws
from fvgen.distill.engines import Engine
from fvgen.objectives import divergences
from fvgen.objectives.dmd import denoising_loss, dmd_gradient, dmd_loss
from fvgen.objectives.gan import approximate_r1, discriminator_loss, generator_loss
from fvgen.objectives.ratio import RatioNormalizer, log_ratio
from fvgen.system.processes import ALONE, World

if TYPE_CHECKING:  # the libraries behind the networks take seconds and a quarter of a gigabyte to import
    from fvgen.clips.latents import LatentBatch
    from fvgen.models.critic import DiscriminatorHead
    from fvgen.models.denoiser import Denoiser, Teacher

Metrics = dict[str, Tensor]
MONITOR = "monitor/"
"""Prefix of metrics that go to monitor.jsonl rather than to metrics.jsonl."""


@dataclass(frozen=True)
class Players:
    """Everybody who takes part. ``fake_score`` and ``normalizer`` are None in stage "gan"."""

    teacher: Teacher
    student: Denoiser
    head: DiscriminatorHead
    fake_score: Denoiser | None
    normalizer: RatioNormalizer | None
    student_engine: Engine
    head_engine: Engine
    fake_score_engine: Engine | None
    world: World = ALONE

    @property
    def schedule(self) -> NoiseSchedule:
        return self.teacher.schedule


@dataclass(frozen=True)
class Rollout:
    """The student's answer to one batch: ``x0`` carries a graph if the student is to learn from it."""

    batch: LatentBatch
    x0: Tensor


@dataclass(frozen=True)
class View:
    """The student's answer as the critics see it: ``x_tau``, noised to ``tau`` [B] with ``noise``, and what the teacher
    makes of it. ``features`` carry the answer's graph; ``x0_real``, the guided real score's estimate, has none (and is
    None in stage "gan")."""

    tau: Tensor
    noise: Tensor
    x_tau: Tensor
    features: Tensor
    x0_real: Tensor | None


def look(players: Players, config: StageConfig, rollout: Rollout, draws: Draws) -> View:
    """One conditional pass of the teacher over the student's answer at a random tau."""
    x0, condition = rollout.x0, rollout.batch.condition
    tau, noise = draws.integers(config.t_min, config.t_max + 1, x0), draws.normal(x0)
    x_tau = players.schedule.add_noise(x0, noise, tau)
    if players.fake_score is None:
        return View(tau, noise, x_tau, players.teacher.features(x_tau, tau, condition), None)
    x0_real, features = players.teacher.judge(x_tau, tau, condition)
    return View(tau, noise, x_tau, features, x0_real)


def roll_out(players: Players, config: StageConfig, batch: LatentBatch, draws: Draws) -> Rollout:
    """The student denoises one of its timesteps; under `torch.no_grad` for the critics alone."""
    make_input = {"noised": noised_input, "simulated": simulated_input}[config.student_input]
    x_t, t = make_input(players, config, batch, draws)
    return Rollout(batch, players.student(x_t, t, batch.condition))


def noised_input(players: Players, config: StageConfig, batch: LatentBatch, draws: Draws) -> tuple[Tensor, Tensor]:
    """A real clip noised to one of the student's timesteps, drawn per sample (algorithm 1, lines 4 and 5)."""
    timesteps = torch.tensor(trailing_timesteps(config.student_steps), device=batch.latents.device)
    t = timesteps[draws.integers(0, len(timesteps), batch.latents)]
    return players.schedule.add_noise(batch.latents, draws.normal(batch.latents), t), t


@torch.no_grad()
def simulated_input(players: Players, config: StageConfig, batch: LatentBatch, draws: Draws) -> tuple[Tensor, Tensor]:
    """The student's own sampling from pure noise down to a random timestep (DMD2, section 4.5), one for the batch."""
    timesteps = trailing_timesteps(config.student_steps)[::-1]
    stop = draws.shared_integer(len(timesteps))
    x_t = draws.normal(batch.latents)
    for t, t_next in pairwise(timesteps[: stop + 1]):
        x0 = players.student(x_t, _full(t, x_t), batch.condition)
        x_t = players.schedule.add_noise(x0, draws.normal(x0), t_next)
    return x_t, _full(timesteps[stop], x_t)


def update_critics(players: Players, config: StageConfig, rollout: Rollout, draws: Draws) -> Metrics:
    """The head learns to tell real from student (Eq. 5), the fake score to denoise the student's output (Eq. 2)."""
    metrics = update_head(players, config, rollout, draws)
    if players.fake_score is not None:
        metrics |= update_fake_score(players, rollout, draws)
    return metrics


def update_critics_and_look(
    players: Players, config: StageConfig, rollout: Rollout, draws: Draws
) -> tuple[Metrics, View]:
    """The same where the student is then judged by the very `View` that the head learns from. The fake score goes
    first, so that its graph and the view's are never in memory together."""
    metrics = {} if players.fake_score is None else update_fake_score(players, rollout, draws)
    seen = look(players, config, rollout, draws)
    return metrics | update_head(players, config, rollout, draws, seen), seen


def update_head(
    players: Players, config: StageConfig, rollout: Rollout, draws: Draws, seen: View | None = None
) -> Metrics:
    """One step of the discriminator head on features of the frozen teacher, of ``seen`` where there is such a view."""
    batch, fake = rollout.batch, rollout.x0.detach()
    if seen is None:
        tau, noise = draws.integers(config.t_min, config.t_max + 1, fake), draws.normal(fake)
    else:
        tau, noise = seen.tau, seen.noise
    real_tau = players.schedule.add_noise(batch.latents, noise, tau)
    with torch.no_grad():
        real_features = players.teacher.features(real_tau, tau, batch.condition)
        if seen is None:
            fake_tau = players.schedule.add_noise(fake, noise, tau)
            fake_features = players.teacher.features(fake_tau, tau, batch.condition)
        else:
            fake_features = seen.features.detach()
    real_logits, fake_logits = players.head(real_features), players.head(fake_features)
    loss = discriminator_loss(real_logits, fake_logits, config.gan_kind).mean()
    metrics = {"loss_head": loss}
    if config.r1_weight > 0:
        with torch.no_grad():
            shaken = real_tau + config.r1_sigma * draws.normal(fake)
            shaken_features = players.teacher.features(shaken, tau, batch.condition)
        penalty = approximate_r1(real_logits, players.head(shaken_features), config.r1_sigma).mean()
        loss = loss + config.r1_weight * penalty
        metrics["loss_r1"] = penalty
    norm = players.head_engine.update(loss)
    both = torch.cat([real_logits, -fake_logits]).detach()
    logits = {"logit_real": real_logits.mean(), "logit_fake": fake_logits.mean()}
    health = {"head_accuracy": (both > 0).float().mean(), MONITOR + "logit_abs": both.abs().mean()}
    return metrics | logits | health | {"grad_norm_head": norm}


def update_fake_score(players: Players, rollout: Rollout, draws: Draws) -> Metrics:
    """One denoising step on the student's output, in the network's own v-parameterisation, t uniform in 0..999."""
    x0 = rollout.x0.detach()
    t = draws.integers(0, 1000, x0)
    noise = draws.normal(x0)
    prediction = players.fake_score.velocity(players.schedule.add_noise(x0, noise, t), t, rollout.batch.condition)
    loss = denoising_loss(prediction, players.schedule.velocity(x0, noise, t)).mean()
    norm = players.fake_score_engine.update(loss)
    return {"loss_fake_score": loss, "grad_norm_fake_score": norm}


def update_student(
    players: Players, config: StageConfig, rollout: Rollout, draws: Draws, seen: View | None = None
) -> Metrics:
    """One step of the student: adversarial loss, and in stage "dmd" the weighted distribution-matching loss (Eq. 8).

    Both look at the same noised output (``seen``, or a new one), so that the logits that drive the one are the density
    ratio of the other, and one conditional pass of the teacher gives features and real score.
    """
    seen = seen or look(players, config, rollout, draws)
    x0, tau = rollout.x0, seen.tau
    with frozen(players.head):
        logits = players.head(seen.features)
    real_logits = None
    if config.gan_kind == "relativistic":
        with torch.no_grad():
            real_tau = players.schedule.add_noise(rollout.batch.latents, seen.noise, tau)
            real_logits = players.head(players.teacher.features(real_tau, tau, rollout.batch.condition))

    adversarial = generator_loss(logits, real_logits, config.gan_kind).mean()
    loss = config.gan_weight * adversarial
    metrics = {"loss_student_gan": adversarial, "student_std": x0.detach().std()}
    if config.regression_weight > 0:
        regression = (x0 - rollout.batch.latents).square().mean()
        loss = loss + config.regression_weight * regression
        metrics["loss_student_regression"] = regression
    if players.fake_score is not None:
        matching, ratio_metrics = matching_loss(players, config, rollout, seen, logits)
        loss = loss + config.dmd_weight * matching
        metrics |= {"loss_student_dmd": matching} | ratio_metrics
    norm = players.student_engine.update(loss)
    return metrics | {"loss_student": loss, "grad_norm_student": norm}


def matching_loss(
    players: Players, config: StageConfig, rollout: Rollout, seen: View, logits: Tensor
) -> tuple[Tensor, Metrics]:
    """The DMD surrogate loss (scalar) on the student's output, weighted by the divergence's h(r)."""
    tau, x0_real = seen.tau, seen.x0_real
    with torch.no_grad():
        x0_fake = players.fake_score(seen.x_tau, tau, rollout.batch.condition)
    ratio = log_ratio(logits)
    h = divergences.weight(config.divergence, ratio)
    weight = players.normalizer.normalize(h, tau, players.world.gather)
    loss = dmd_loss(rollout.x0, dmd_gradient(rollout.x0, x0_real, x0_fake, weight)).mean()
    ratios = {"log_ratio": ratio.mean(), "log_ratio_max": ratio.abs().max()}
    weights = {"weight_h": h.mean(), "weight": weight.mean(), "weight_min": weight.min(), "weight_max": weight.max()}
    return loss, ratios | weights


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Graphs made inside lead through ``module`` but not into its parameters, so that the backward pass of another
    network's loss leaves no gradient there (DeepSpeed would take any for a part of the module's own update)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _full(t: int, like: Tensor) -> Tensor:
    return torch.full((like.shape[0],), t, dtype=torch.long, device=like.device)
