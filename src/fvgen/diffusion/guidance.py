"""Classifier-free guidance, as functions of velocities."""

import torch
from torch import Tensor


def guided_velocity(v_cond: Tensor, v_uncond: Tensor, guidance: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance of velocities [B, ...]: v_uncond + guidance (v_cond - v_uncond), then rescaled."""
    return rescale_guidance(torch.lerp(v_uncond, v_cond, guidance), v_cond, rescale)


def guided_velocity_three_way(
    v_cond: Tensor, v_image: Tensor, v_uncond: Tensor, guidance: float, image_guidance: float, rescale: float = 0.0
) -> Tensor:
    """Separate guidance by image and text; `v_image` sees the image but an empty text (InstructPix2Pix, equation 3)."""
    guided = v_uncond + image_guidance * (v_image - v_uncond) + guidance * (v_cond - v_image)
    return rescale_guidance(guided, v_cond, rescale)


def emphasised(v: Tensor, v_cond: Tensor, v_without: Tensor, weight: float) -> Tensor:
    """``v`` [B, ...], guided or not, with what one part of the condition brings to it, ``v_cond - v_without``,
    ``weight`` times in place of once: of that part alone what `guided_velocity` is of all."""
    return v + (weight - 1.0) * (v_cond - v_without)


def rescale_guidance(v: Tensor, v_cond: Tensor, rescale: float) -> Tensor:
    """Mix v with itself at the standard deviation of `v_cond`, per sample (Lin et al. 2024, equations 15 and 16)."""
    if rescale == 0.0:
        return v
    axes = list(range(1, v.ndim))
    ratio = v_cond.std(dim=axes, keepdim=True) / v.std(dim=axes, keepdim=True)
    return v * (rescale * ratio + (1.0 - rescale))
