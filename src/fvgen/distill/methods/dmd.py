"""Adversarial distribution matching: FVGen's two stages, DMD without GAN and GAN without DMD, settings of one method.

Symbols follow FVGen, algorithm 1: t is one of the student's own timesteps, tau the timestep at which its output and the
real clip are noised again for the critics (same noise, same tau for both). Latents are [B, C, F, h, w].

What an iteration with one critic update costs, in passes of the network over B clips (forward; with a graph; backward),
h being the part of the network up to the tap (about half of it), and why not fewer:

    rollout          1, with a graph   one for head, fake score and student: the student does not move in between
    head             2 h               features of the real and of the student's clip, at one tau with one noise
    fake score       1 and backward    its own draw of t, as its own loss needs it: no other pass sees this input
    student: critic  1 + backward h    the teacher's conditional pass is both feature extractor and real score; its
                                       graph ends at the tap, whose backward needs no weight gradients
    student: scores  1 or 2            the fake score at the same place; the unconditional teacher where guidance is on
    student          backward          one for the sum of all its losses

The head sees the student's clip at one tau and the student is judged at another, so as not to be judged where the head
has just been fitted; ``same_noise=true`` (algorithm 1 as printed: one tau and noise for both) makes them one pass and
saves h. ``one_pass=true`` lets the fake score learn at that place as well: its pass with a graph is then the one that
judges the student, too, which saves 1. Below that nothing can be shared: what remains are different networks. Each
further critic update costs 1 + 2 h and the fake score's pass. With several parts (``accumulation``) the student's
rollout is computed again for its own update, for keeping all parts' graphs would keep the memory that they are to save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from fvgen.diffusion.samplers import few_step
from fvgen.diffusion.schedule import NoiseSchedule, trailing_timesteps
from fvgen.distill.draws import Draws
from fvgen.distill.learners import Learner
from fvgen.distill.methods.base import MONITOR, Deal, Method, Metrics, Setup
from fvgen.distill.methods.dmd_settings import STEP_COUNTS, DmdSettings
from fvgen.objectives import divergences
from fvgen.objectives.dmd import denoising_loss, dmd_gradient, dmd_loss
from fvgen.objectives.gan import KINDS, approximate_r1, discriminator_loss, generator_loss
from fvgen.objectives.ratio import TINY, RatioConstant, RatioNormalizer, log_ratio
from fvgen.system.processes import ALONE, World

if TYPE_CHECKING:  # the libraries behind the networks take seconds and a quarter of a gigabyte to import
    from fvgen.clips.latents import LatentBatch
    from fvgen.distill.settings import StageConfig
    from fvgen.models.critic import Critic
    from fvgen.models.denoiser import Denoiser, Teacher


MORE_OF_HEAD = 4  # updates at most that a head below its floor gets more


@dataclass(frozen=True)
class Rollout:
    """The student's answer to one batch: ``x0`` carries a graph if the student is to learn from it."""

    batch: LatentBatch
    x0: Tensor


@dataclass(frozen=True)
class View:
    """The student's answer as the critics see it: ``x_tau``, noised to ``tau`` [B] with ``noise``, and what they make
    of it. ``features`` carry the answer's graph; the clean estimates have none: ``x0_real`` is the guided real score's
    (None where no distribution is matched), ``x0_fake`` the fake score's (None where it has not looked yet)."""

    tau: Tensor
    noise: Tensor
    x_tau: Tensor
    features: tuple[Tensor, ...] = ()
    x0_real: Tensor | None = None
    x0_fake: Tensor | None = None


class Dmd(Method):
    """A student between a teacher and its critics: ``critic`` (with the learner ``head``) and the learner
    ``fake_score``, each None where the settings need none. ``normalizer`` goes with the fake score, ``constant`` with a
    relativistic head whose logits are to be density ratios.

    head_on: whose features the head sees.
    """

    head_on: ClassVar[Literal["teacher", "fake_score"]] = "teacher"

    def __init__(
        self,
        settings: DmdSettings,
        teacher: Teacher,
        student: Learner,
        critic: Critic | None = None,
        head: Learner | None = None,
        fake_score: Learner | None = None,
        normalizer: RatioNormalizer | None = None,
        world: World = ALONE,
        constant: RatioConstant | None = None,
    ) -> None:
        self.settings, self.teacher, self.critic = settings, teacher, critic
        self.normalizer, self.constant, self.world = normalizer, constant, world
        self.parts = 1  # in which the clips of an update come
        self.learners = {each.name: each for each in (student, head, fake_score) if each is not None}
        states = {"normalizer": normalizer, "ratio_constant": constant}
        self.states = {name: state for name, state in states.items() if state is not None}
        self.exported = tuple(name for name in ("student", "head") if name in self.learners)

    @classmethod
    def build(cls, setup: Setup) -> Dmd:
        from fvgen.distill.methods.networks import build_dmd  # takes seconds to import

        return build_dmd(cls, setup, cls.head_on)

    def export(self, folder: Path, weights: Mapping[str, Mapping[str, Tensor]], base: Any, config: StageConfig) -> None:
        from fvgen.distill.methods.written import write_adapter, write_head, write_student

        write_student(config, base, weights["student"], folder / "student")
        if config.memory.student_lora:
            write_adapter(weights["student"], folder)
        if self.critic is not None:
            write_head(self.critic.head, weights["head"], folder / "head")

    @property
    def student(self) -> Denoiser:
        return self.learners["student"].module

    @property
    def fake_score(self) -> Denoiser | None:
        return self.learners["fake_score"].module if "fake_score" in self.learners else None

    @property
    def schedule(self) -> NoiseSchedule:
        return self.teacher.schedule

    # --- An iteration ---

    def iterate(self, iteration: int, deal: Deal) -> list[Metrics]:
        """``critic_updates`` updates of the critics, then one of the student, on the last rollout."""
        settings, student_learns = self.settings, iteration > self.settings.head_warmup
        rows: list[Metrics] = []
        for turn in range(settings.critic_updates):
            earlier, rows = rows, []
            parts = deal()
            self.parts = len(parts)
            starts = [draws.copy() for _, draws in parts] if len(parts) > 1 else []
            shared = student_learns and turn == settings.critic_updates - 1 and len(parts) == 1
            for batch, draws in parts:
                with torch.set_grad_enabled(shared):
                    rollout = self.roll_out(batch, draws)
                if shared and settings.same_noise:
                    metrics, seen = self.update_critics_and_look(rollout, draws)
                else:
                    metrics, seen = self.update_critics(rollout, draws), None
                rows.append(metrics)
            if earlier:
                rows = [_heeding(row, before) for row, before in zip(rows, earlier, strict=True)]
        if student_learns:
            for index, (batch, draws) in enumerate(parts):
                if not shared:  # the same rollout once more, with a graph: keeping all parts' graphs takes more memory
                    rollout = self.roll_out(batch, starts[index])
                rows[index] |= self.update_student(rollout, draws, seen)
            average = self.learners["student"].average
            if average is not None:
                average.update()
        return rows

    def sample(self, batch: LatentBatch, seed: int) -> Tensor:
        """The student's own sampling; noise of ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(batch.latents.shape, generator=generator).to(batch.latents.device)

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return self.student(x_t, t, batch.condition)

        return few_step(denoise, noise, self.schedule, self.settings.student_steps, generator=generator)

    # --- What the student denoises ---

    def roll_out(self, batch: LatentBatch, draws: Draws) -> Rollout:
        """The student denoises one of its timesteps; under `torch.no_grad` for the critics alone."""
        make_input = {"noised": self.noised_input, "simulated": self.simulated_input}[self.settings.student_input]
        x_t, t = make_input(batch, draws)
        return Rollout(batch, self.student(x_t, t, batch.condition))

    def noised_input(self, batch: LatentBatch, draws: Draws) -> tuple[Tensor, Tensor]:
        """A real clip noised to one of the student's timesteps, drawn per sample (algorithm 1, lines 4 and 5)."""
        most = STEP_COUNTS[-1] if self.settings.any_step else self.settings.student_steps
        timesteps = torch.tensor(trailing_timesteps(most), device=batch.latents.device)
        place = draws.integers(0, most, batch.latents)
        if self.settings.any_step:  # the trailing timesteps of fewer steps are among those of more
            counts = torch.tensor(STEP_COUNTS, device=place.device)[draws.integers(0, len(STEP_COUNTS), batch.latents)]
            stride = torch.div(most, counts, rounding_mode="floor")
            place = (torch.div(place, stride, rounding_mode="floor") + 1) * stride - 1
        t = timesteps[place]
        return self.schedule.add_noise(batch.latents, draws.normal(batch.latents), t), t

    @torch.no_grad()
    def simulated_input(self, batch: LatentBatch, draws: Draws) -> tuple[Tensor, Tensor]:
        """The student's own sampling from pure noise down to a random timestep (DMD2, section 4.5), one for the
        batch."""
        count = STEP_COUNTS[draws.shared_integer(len(STEP_COUNTS))] if self.settings.any_step else None
        timesteps = trailing_timesteps(count or self.settings.student_steps)[::-1]
        stop = draws.shared_integer(len(timesteps))
        x_t = draws.normal(batch.latents)
        for t, t_next in pairwise(timesteps[: stop + 1]):
            x0 = self.student(x_t, _full(t, x_t), batch.condition)
            x_t = self.schedule.add_noise(x0, draws.normal(x0), t_next)
        return x_t, _full(timesteps[stop], x_t)

    # --- The critics ---

    def place(self, x0: Tensor, draws: Draws) -> View:
        """The student's answer at a random tau, where nobody has looked yet."""
        tau, noise = self.draw_tau(x0, draws), draws.normal(x0)
        return View(tau, noise, self.schedule.add_noise(x0, noise, tau))

    def draw_tau(self, x0: Tensor, draws: Draws) -> Tensor:
        """[B] timesteps at which the critics look, one a clip."""
        low, high, shift = self.settings.t_min, self.settings.t_max, self.settings.tau_shift
        tau = draws.integers(low, high + 1, x0)
        if shift == 1:
            return tau
        u = (tau - low) / max(high - low, 1)
        return low + (shift * u / (1 + (shift - 1) * u) * (high - low)).round().long()

    def look(self, rollout: Rollout, draws: Draws, at: View | None = None) -> View:
        """One conditional pass of the teacher over the student's answer, ``at`` a given place or a new one."""
        at, condition = at or self.place(rollout.x0, draws), rollout.batch.condition
        if self.fake_score is None:
            return replace(at, features=self.critic.features(at.x_tau, at.tau, condition))
        taps = self.critic.taps if self.critic and self.head_on == "teacher" else ()
        x0_real, features = self.teacher.judge(at.x_tau, at.tau, condition, taps)
        return replace(at, features=features, x0_real=x0_real)

    def update_critics(self, rollout: Rollout, draws: Draws) -> Metrics:
        """The head learns to tell real from student (Eq. 5), the fake score to denoise the student's output (Eq. 2)."""
        metrics = {} if self.critic is None else self.update_head(rollout, draws)
        for _ in range(MORE_OF_HEAD if self.settings.head_pair_floor and self.critic is not None else 0):
            if self.world.gather(metrics["head_pair_accuracy"][None]).mean() >= self.settings.head_pair_floor:
                break
            metrics = self.update_head(rollout, draws)
        if self.fake_score is not None:
            metrics |= self.update_fake_score(rollout, draws)
        return metrics

    def update_critics_and_look(self, rollout: Rollout, draws: Draws) -> tuple[Metrics, View]:
        """The same where the student is then judged by the very `View` that the head learns from. The fake score goes
        first, so that its graph and the view's are never in memory together."""
        metrics, at = {}, None
        if self.settings.one_pass and self.fake_score is not None:
            at = self.place(rollout.x0, draws)
            x_tau = at.x_tau.detach()
            metrics, velocity = self.fake_score_step(rollout, x_tau, at.tau, at.noise, draws)
            at = replace(at, x0_fake=self.schedule.x0_from_v(x_tau, velocity, at.tau))
        elif self.fake_score is not None:
            metrics = self.update_fake_score(rollout, draws)
        seen = self.look(rollout, draws, at)
        return metrics | ({} if self.critic is None else self.update_head(rollout, draws, seen)), seen

    def update_head(self, rollout: Rollout, draws: Draws, seen: View | None = None) -> Metrics:
        """One step of the discriminator head on the critic's features, of ``seen`` where there is such a view."""
        settings, critic, batch, x0 = self.settings, self.critic, rollout.batch, rollout.x0.detach()
        if seen is None:
            tau, noise = self.draw_tau(x0, draws), draws.normal(x0)
        else:
            tau, noise = seen.tau, seen.noise
        real_tau = self.schedule.add_noise(batch.latents, noise, tau)
        with torch.no_grad():
            real_features = critic.features(real_tau, tau, batch.condition)
            if seen is None:
                fake_features = critic.features(self.schedule.add_noise(x0, noise, tau), tau, batch.condition)
            else:
                fake_features = tuple(features.detach() for features in seen.features)
        real_logits, fake_logits = critic.head(*real_features), critic.head(*fake_features)
        loss = discriminator_loss(real_logits, fake_logits, settings.gan_kind).mean()
        metrics = {"loss_head": loss}
        if settings.r1_weight > 0:
            with torch.no_grad():
                shaken = real_tau + settings.r1_sigma * draws.normal(x0)
                shaken_features = critic.features(shaken, tau, batch.condition)
            penalty = approximate_r1(real_logits, critic.head(*shaken_features), settings.r1_sigma).mean()
            loss = loss + settings.r1_weight * penalty
            metrics["loss_r1"] = penalty
        norm = self.learn("head", loss)
        real, fake = log_ratio(real_logits), log_ratio(fake_logits)
        if self.constant is not None:
            self.constant.update(real, fake, tau, self.world.gather)
        both = torch.cat([real_logits, -fake_logits]).detach()
        logits = {"logit_real": real_logits.mean(), "logit_fake": fake_logits.mean()}
        health = {"head_accuracy": (both > 0).float().mean(), "head_pair_accuracy": (real > fake).float().mean()}
        watched = {MONITOR + "logit_abs": both.abs().mean()}
        return metrics | logits | health | watched | {"grad_norm_head": norm}

    def update_fake_score(self, rollout: Rollout, draws: Draws) -> Metrics:
        """One denoising step on the student's output, in the network's own v-parameterisation, t uniform in 0..999."""
        x0 = rollout.x0.detach()
        t = draws.integers(0, 1000, x0)
        noise = draws.normal(x0)
        return self.fake_score_step(rollout, self.schedule.add_noise(x0, noise, t), t, noise, draws)[0]

    def fake_score_step(
        self, rollout: Rollout, x_t: Tensor, t: Tensor, noise: Tensor, draws: Draws
    ) -> tuple[Metrics, Tensor]:
        """That step at ``x_t``, the student's output noised to ``t`` [B] with ``noise``; and the velocity that the fake
        score saw there before it."""
        prediction = self.fake_score.velocity(x_t, t, rollout.batch.condition)
        loss = denoising_loss(prediction, self.schedule.velocity(rollout.x0.detach(), noise, t)).mean()
        more, metrics = self.more_of_fake_score(rollout, draws)
        norm = self.learn("fake_score", loss if more is None else loss + more)
        return {"loss_fake_score": loss, "grad_norm_fake_score": norm} | metrics, prediction.detach()

    def more_of_fake_score(self, rollout: Rollout, draws: Draws) -> tuple[Tensor | None, Metrics]:
        """What a method lets the fake score learn beside that, a scalar, and what is logged of it."""
        return None, {}

    def learn(self, learner: str, loss: Tensor) -> Tensor | None:
        """One step of a critic; returns its gradient's norm."""
        return self.learners[learner].update(loss)

    # --- The student ---

    def update_student(self, rollout: Rollout, draws: Draws, seen: View | None = None) -> Metrics:
        """One step of the student down the sum of its losses."""
        losses, metrics = self.student_losses(rollout, draws, seen)
        loss = _sum(losses)
        norm = self.learners["student"].update(loss)  # a hook adds to the metrics
        return metrics | {"loss_student": loss, "grad_norm_student": norm}

    def student_losses(self, rollout: Rollout, draws: Draws, seen: View | None) -> tuple[list[Tensor], Metrics]:
        """The weighted losses (scalars with a graph) that the student learns from, and what is logged of them: the
        adversarial loss, the regression, and the weighted distribution-matching loss (Eq. 8).

        All look at the same noised output (``seen``, or a new one), so that the logits that drive the one are the
        density ratio of the other, and one conditional pass of the teacher gives features and real score. A method of
        this kind with an objective of its own adds to this list.
        """
        settings, x0 = self.settings, rollout.x0
        losses: list[Tensor] = []
        metrics: Metrics = {}
        logits = None
        if self.critic is not None or self.fake_score is not None:
            seen = seen or self.look(rollout, draws)
        if self.critic is not None:
            with self.learners["head"].frozen() as head:
                logits = head(*seen.features)
            adversarial = self.adversarial_loss(rollout, seen, logits)
            if settings.gan_weight and seen.x_tau.requires_grad:
                seen.x_tau.register_hook(partial(_watch, metrics, "gradient_gan", self.parts))
            losses.append(settings.gan_weight * self.adversarial_step(adversarial, x0, draws))
            metrics["loss_student_gan"] = adversarial
        metrics["student_std"] = x0.detach().std()
        if settings.regression_weight > 0:
            regression = (x0 - rollout.batch.latents).square().mean()
            losses.append(settings.regression_weight * regression)
            metrics["loss_student_regression"] = regression
        if self.fake_score is not None:
            matching, ratios = self.matching_loss(rollout, seen, logits)
            losses.append(settings.dmd_weight * matching)
            metrics |= {"loss_student_dmd": matching} | ratios
        return losses, metrics

    def adversarial_loss(self, rollout: Rollout, seen: View, logits: Tensor) -> Tensor:
        """How little the head takes the student's output for real, a scalar."""
        real_logits = None
        if KINDS[self.settings.gan_kind].paired:
            with torch.no_grad():
                real_tau = self.schedule.add_noise(rollout.batch.latents, seen.noise, seen.tau)
                real_logits = self.critic.logits(real_tau, seen.tau, rollout.batch.condition)
        return generator_loss(logits, real_logits, self.settings.gan_kind).mean()

    def adversarial_step(self, adversarial: Tensor, x0: Tensor, draws: Draws) -> Tensor:
        """What the student descends for the adversarial loss: itself, or with ``balance`` a stand-in of the same
        direction whose gradient's entries are one in the mean, in units of 1/n of a mean over a sample's n entries.
        That is the size that Eq. 8's normaliser gives the matching loss."""
        if not self.settings.balance:
            return adversarial
        gradient = self.gan_gradient(adversarial, x0)
        size = gradient.abs().mean() * x0.numel()  # the loss is a mean over clips as well
        return (x0 * (gradient / size.clamp(min=TINY))).sum()

    def gan_gradient(self, adversarial: Tensor, x0: Tensor) -> Tensor:
        """Of the adversarial loss with respect to the student's output, in its shape."""
        (gradient,) = torch.autograd.grad(adversarial, x0, retain_graph=True)
        return gradient.detach()

    def real_estimate(self, rollout: Rollout, seen: View) -> Tensor:
        """What the student is pulled towards, [B, C, F, h, w] without a graph: the real score's clean estimate."""
        return seen.x0_real

    def matching_loss(self, rollout: Rollout, seen: View, logits: Tensor | None) -> tuple[Tensor, Metrics]:
        """The DMD surrogate loss (scalar) on the student's output, weighted by the divergence's h(r); without logits
        every ratio weighs one, and of a relativistic head's the constant is taken off first."""
        tau = seen.tau
        with torch.no_grad():
            x0_fake = seen.x0_fake
            if x0_fake is None:
                x0_fake = self.fake_score(seen.x_tau, tau, rollout.batch.condition)
            x0_real = self.real_estimate(rollout, seen)
            errors = _errors(rollout.x0, seen.x0_real, x0_fake)
        if logits is None:
            gradient = dmd_gradient(rollout.x0, x0_real, x0_fake, torch.ones_like(tau, dtype=torch.float32))
            return dmd_loss(rollout.x0, gradient).mean(), errors | {MONITOR + "gradient_dmd": gradient.abs().mean()}
        ratio, constant = log_ratio(logits), {}
        if self.constant is not None:
            c = self.constant.at(tau)
            ratio, constant = ratio - c, {"ratio_constant": c.mean()}
        h = divergences.weight(self.settings.divergence, ratio)
        if self.settings.ratio_norm == "batch":
            weight = h / self.world.gather(h).mean().clamp(min=TINY)
        else:
            weight = self.normalizer.normalize(h, tau, self.world.gather)
        gradient = dmd_gradient(rollout.x0, x0_real, x0_fake, weight)
        loss = dmd_loss(rollout.x0, gradient).mean()
        constant[MONITOR + "gradient_dmd"] = gradient.abs().mean()
        ratios = {"log_ratio": ratio.mean(), "log_ratio_max": ratio.abs().max()}
        weights = {"weight_h": h.mean(), "weight": weight.mean()}
        extremes = {"weight_min": weight.min(), "weight_max": weight.max()}
        return loss, ratios | constant | weights | extremes | errors


def _heeding(row: Metrics, earlier: Metrics) -> Metrics:
    """A turn's numbers, or in their places those of the ``earlier`` turn that are none: its updates were skipped, and
    the log and the guard see one row of an iteration."""
    pairs = {name: (value, earlier[name]) for name, value in row.items() if value is not None}
    return row | {name: torch.where(old.isfinite(), new, old) for name, (new, old) in pairs.items()}


def _watch(metrics: Metrics, name: str, parts: int, gradient: Tensor) -> None:
    """The mean size of a loss's gradient at the student's noised output, in units of 1/n of a mean over the n entries
    of all parts: as large as the matching loss's is where both weigh the same."""
    metrics[MONITOR + name] = gradient.abs().mean() * gradient.numel() * parts


def _errors(x0: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Metrics:
    """What the fake score's and the teacher's clean estimates are off, at the very same noised output of the student:
    mean squares. The fake score learns to have the smaller one. What is no number counts as 0: watching ends no run."""
    estimates = {"error_fake": x0_fake, "error_teacher": x0_real}
    return {
        MONITOR + name: (estimate - x0).float().square().mean().nan_to_num(0, 0, 0)
        for name, estimate in estimates.items()
    }


def _sum(losses: list[Tensor]) -> Tensor:
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total


def _full(t: int, like: Tensor) -> Tensor:
    return torch.full((like.shape[0],), t, dtype=torch.long, device=like.device)
