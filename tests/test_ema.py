"""Averaged weights against their closed form."""

from __future__ import annotations

import torch
from torch import nn

from fvgen.distill.ema import EMA
from fvgen.distill.engines import Optimization, PlainEngine


def averaged(decay: float) -> tuple[nn.Linear, EMA]:
    source = nn.Linear(3, 2)
    settings = Optimization(lr=1e-3, betas=(0.0, 0.9), weight_decay=0.0, clip_norm=1.0)
    return source, EMA(PlainEngine(source, settings), decay)


def test_the_distance_to_a_source_at_rest_shrinks_by_the_decay():
    source, ema = averaged(0.9)
    with torch.no_grad():
        source.weight += 1.0
    start = ema.weights()["weight"].clone()
    for n in range(1, 6):
        ema.update()
        torch.testing.assert_close(ema.weights()["weight"], start + 1 - 0.9**n, atol=1e-6, rtol=0)


def test_the_average_owns_its_weights_and_survives_a_round_trip():
    (source, ema), (_, restored) = averaged(0.5), averaged(0.5)
    with torch.no_grad():
        source.weight.zero_()
    assert ema.weights()["weight"].abs().sum() > 0
    restored.load_state_dict(ema.state_dict())
    assert torch.equal(restored.weights()["weight"], ema.weights()["weight"])
