"""The depth maps that come with a scene."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fvgen.scenes.images import fit_depth
from fvgen.scenes.scene import Scene


def lacks(scene: Scene) -> str | None:
    return None if scene.depth_paths else "the scene has no depth maps"


def run(scene: Scene, views: Sequence[int], height: int, width: int) -> Tensor:
    return torch.stack([fit_depth(scene.depth(view), height, width) for view in views])
