"""Losses of a policy pi over K arms that earn rewards r, more being better: one value per sample [B], of logits [B, K].

    full information   -sum_a pi(a) r(a) - h H(pi)            every arm's reward is known: no sampling, no baseline
    REINFORCE          -(r - b) log pi(a) - h H(pi),  a ~ pi  Williams 1992; the one arm that the policy itself drew

VideoScene (Wang et al. 2025, equation 9) prints the expectation of r with r = -error and says that it is minimised:
that finds the worst arm. And it takes its actions from the distillation's own draws, which are not the policy's. Both
are put right here.
"""

from __future__ import annotations

from torch import Tensor


def full_information(logits: Tensor, rewards: Tensor, entropy: float = 0.0) -> Tensor:
    """[B] of all arms' rewards [B, K]."""
    return -(logits.softmax(1) * rewards).sum(1) - entropy * entropy_of(logits)


def reinforce(logits: Tensor, arm: Tensor, reward: Tensor, baseline: Tensor | float, entropy: float = 0.0) -> Tensor:
    """[B] of the arm [B] that the policy drew and its reward [B]; ``baseline`` must not depend on the arm."""
    chosen = logits.log_softmax(1).gather(1, arm[:, None])[:, 0]
    return -(reward - baseline) * chosen - entropy * entropy_of(logits)


def entropy_of(logits: Tensor) -> Tensor:
    """[B] H(pi) in nats."""
    log = logits.log_softmax(1)
    return -(log.exp() * log).sum(1)
