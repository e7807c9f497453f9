"""Controls: trainings that must gain nothing. What they gain, an adversarial method has not earned."""

from __future__ import annotations

from torch import Tensor

from fvgen.distill.draws import Draws
from fvgen.distill.methods.dmd import Dmd


class RandomGradient(Dmd):
    """The head learns as ever; the student descends a random direction of the adversarial gradient's norm, clip by
    clip."""

    def adversarial_step(self, adversarial: Tensor, x0: Tensor, draws: Draws) -> Tensor:
        gradient, random = self.gan_gradient(adversarial, x0), draws.normal(x0)
        norms = [x.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1) for x in (gradient, random)]
        return (x0 * (random * norms[0] / norms[1])).sum()


class FrozenHead(Dmd):
    """The student is judged by a head that stays as it was drawn."""

    def learn(self, learner: str, loss: Tensor) -> Tensor | None:
        return None if learner == "head" else super().learn(learner, loss)
