"""DMD2 (Yin et al. 2024, section 4): the head sits on the fake score, which learns to tell real from fake as well.

What differs from `fvgen.distill.methods.dmd` is whose features the head sees, that the head's loss is also the fake
score's (with a small weight), and the defaults: five critic updates for one of the student, whose inputs are its own
earlier steps. Head and fake score learn from draws of their own, where DMD2 shares one.

f-distill (Xu et al. 2025) is the same with a divergence whose weights are not one, divided by the batch's own mean
(``ratio_norm=batch``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from fvgen.distill.draws import Draws
from fvgen.distill.methods.base import Metrics
from fvgen.distill.methods.dmd import Dmd, Rollout, View
from fvgen.distill.methods.dmd_settings import DmdSettings
from fvgen.objectives.gan import discriminator_loss


class Dmd2Settings(DmdSettings):
    """`DmdSettings` with DMD2's defaults."""

    student_input: Literal["noised", "simulated"] = Field("simulated", description="as in `DmdSettings`; DMD2's own")
    critic_updates: int = Field(5, ge=1, description="updates of head and fake score per student update")
    divergence: str = Field("reverse_kl", description="as in `DmdSettings`")
    feature_weight: float = Field(0.03, ge=0, description="of the head's loss in the fake score's own")

    @model_validator(mode="after")
    def _has_both(self) -> Dmd2Settings:
        if not (self.matching and self.judging):
            raise ValueError("this method's head sees the fake score: gan_weight and dmd_weight must both be above 0")
        return self


class Dmd2(Dmd):
    """Distribution matching whose head sees the fake score's features."""

    head_on: ClassVar = "fake_score"
    settings: Dmd2Settings

    def look(self, rollout: Rollout, draws: Draws, at: View | None = None) -> View:
        """The teacher's estimate and the fake score's features at one random tau."""
        seen = super().look(rollout, draws, at)
        with self.learners["fake_score"].frozen():
            features = self.critic.features(seen.x_tau, seen.tau, rollout.batch.condition)
        return replace(seen, features=features)

    def more_of_fake_score(self, rollout: Rollout, draws: Draws) -> tuple[Tensor | None, Metrics]:
        """The head's loss, as the fake score's features could lower it; the head stays as it is."""
        settings, x0, real = self.settings, rollout.x0.detach(), rollout.batch.latents
        tau, noise = self.draw_tau(x0, draws), draws.normal(x0)
        noised = (self.schedule.add_noise(clip, noise, tau) for clip in (real, x0))
        pair = [self.critic.features(clip, tau, rollout.batch.condition) for clip in noised]
        with self.learners["head"].frozen() as head:
            loss = discriminator_loss(head(*pair[0]), head(*pair[1]), settings.gan_kind).mean()
        return settings.feature_weight * loss, {"loss_features": loss}
