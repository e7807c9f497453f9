"""Averaged weights against their closed form."""

from __future__ import annotations

import torch
from torch import nn

from fvgen.distill.ema import EMA


def test_the_distance_to_a_source_at_rest_shrinks_by_the_decay():
    source = nn.Linear(3, 2).double()
    ema = EMA(source, decay=0.9)
    start = source.weight.detach().clone()
    with torch.no_grad():
        source.weight += 1.0
    for n in range(1, 6):
        ema.update(source)
        torch.testing.assert_close(ema.module.weight, start + 1 - 0.9**n, atol=1e-12, rtol=0)


def test_the_average_owns_its_weights_and_survives_a_round_trip():
    source = nn.Linear(3, 2)
    ema, restored = EMA(source, 0.5), EMA(nn.Linear(3, 2), 0.5)
    with torch.no_grad():
        source.weight.zero_()
    assert ema.module.weight.abs().sum() > 0 and not any(p.requires_grad for p in ema.module.parameters())
    restored.load_state_dict(ema.state_dict())
    assert torch.equal(restored.module.weight, ema.module.weight)
