"""An f-divergence of one's own is a row: f, and its weight h(r) = r^2 f''(r) on the DMD gradient, in log r.

Here the triangular discrimination (Le Cam), the integral of (p - q)^2 / (p + q): f(r) = (r - 1)^2 / (r + 1), hence
h(r) = 8 r^2 / (r + 1)^3. It listens most where the teacher has twice the student's density, and to nothing where either
has next to none.
"""

import torch
from torch.nn.functional import softplus

from fvgen import distill
from fvgen.objectives import DIVERGENCES, weight
from fvgen.objectives.divergences import Divergence

DIVERGENCES["triangular"] = Divergence(
    f=lambda r: (r - 1) ** 2 / (r + 1),
    weight=lambda log_r: 8 * (2 * log_r - 3 * softplus(log_r)).exp(),
    measures="integral of (p - q)^2 / (p + q)",
)

# The two halves of the row belong together: differentiate f twice and compare.
log_r = torch.linspace(-6, 6, 601, dtype=torch.float64)
r = log_r.exp().requires_grad_()
(first,) = torch.autograd.grad(DIVERGENCES["triangular"].f(r).sum(), r, create_graph=True)
(second,) = torch.autograd.grad(first.sum(), r)
torch.testing.assert_close(weight("triangular", log_r), (r**2 * second).detach())
print(f"h is largest at r = {r[weight('triangular', log_r).argmax()].item():.1f}")

# From here on it is a setting like any other. (Stage 2 alone, without the initialisation that the paper gives it.)
settings = {"teacher": "tiny", "data": "builtin", "clips": 4, "batch_size": 2, "iterations": 2, "critic_updates": 1}
config = distill.stage_config("dmd", {**settings, "divergence": "triangular", "out": "runs/examples/triangular"})
student = distill.run(config)
for row in distill.read_metrics(config.run.out):
    print(row)
print(f"{student}: a student by {DIVERGENCES['triangular'].measures}")
