"""A wall at distance 1 before every view: what tells a path its scale where a model looks at cameras alone.

Never chosen by itself: points that lie on it are no reconstruction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fvgen.scenes.scene import Scene


def lacks(scene: Scene | None) -> str | None:
    return None


def run(scene: Scene, views: Sequence[int], height: int, width: int) -> Tensor:
    return torch.ones(len(views), height, width)
