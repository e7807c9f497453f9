"""Camera paths and a camera-guided CogVideoX, small."""

from __future__ import annotations

from typing import Any

import torch
from small_cogvideox import FRAMES, HEIGHT, WIDTH, transformer
from torch import Tensor

from fvgen.geometry.cameras import Cameras, pinhole
from fvgen.models.cogvideox.camera import CameraTransformer
from fvgen.models.condition import Condition
from fvgen.pipelines.cameras import clip_path

SETTINGS = {"control_blocks": 1, "camera_lora_rank": 2, "encoder_width": 8}
BRANCHES = ("lora", "control", "dual")


def cameras(seed: int = 0, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> Cameras:
    """A straight walk in a random direction with a slow turn."""
    generator = torch.Generator().manual_seed(seed)
    step, spin = torch.randn(2, 3, generator=generator)
    far = torch.linspace(0, 1, frames)
    skew = torch.zeros(3, 3)
    skew[0, 1], skew[0, 2], skew[1, 2] = spin * 0.2
    poses = torch.eye(4).repeat(frames, 1, 1)
    poses[:, :3, :3] = torch.linalg.matrix_exp(far[:, None, None] * (skew - skew.T))
    poses[:, :3, 3] = far[:, None] * step
    return Cameras(poses, pinhole(frames, height, width, 60), height, width)


def guided(positions: str = "rotary", copy_blocks: bool = True, seed: int = 5, **changes: Any) -> CameraTransformer:
    """As `small_cogvideox.transformer`, with what is new at its start."""
    base = transformer(positions)
    torch.manual_seed(seed)
    return CameraTransformer.from_base(base, copy_blocks, **SETTINGS | changes)


def moved(network: CameraTransformer, size: float = 0.3, seed: int = 6) -> CameraTransformer:
    """With random numbers added to all that is new: as after a training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if network.is_guide(name):
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return network


def paths(clips: int = 2, seed: int = 0) -> Tensor:
    """[B, F, 21]."""
    return torch.stack([clip_path(cameras(seed + clip)) for clip in range(clips)])


def with_paths(condition: Condition, seed: int = 0) -> Condition:
    return condition.replaced({"camera_path": paths(condition.clips, seed)})
