"""What the objectives share: one value per sample, and tables that answer a misspelt name."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

import torch
from torch import Tensor

Row = TypeVar("Row")


def full_precision(x: Tensor) -> Tensor:
    """x in float32 where it was narrower (bf16, fp16); float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sample_mean(x: Tensor) -> Tensor:
    """Mean over every axis but the first: [B, ...] -> [B], at least float32."""
    assert x.ndim >= 1, "a batch axis is needed"
    return full_precision(x).reshape(x.shape[0], -1).mean(dim=1)


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """value [B] with trailing axes of length one, so that it multiplies like [B, ...]."""
    assert value.shape == like.shape[:1], f"expected one value per sample, got {tuple(value.shape)}"
    return value.reshape(-1, *[1] * (like.ndim - 1))


def row(table: Mapping[str, Row], name: str, what: str) -> Row:
    """table[name]; an unknown name raises ValueError that names the nearest known one."""
    if name in table:
        return table[name]
    near = get_close_matches(name, table, n=1, cutoff=0.0)
    raise ValueError(f"Unknown {what} '{name}': did you mean '{near[0]}'? Known are {', '.join(table)}.")
