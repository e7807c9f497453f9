"""What CogVideoX's causal 3D VAE does to a clip: which sizes it takes, and how they come out.

It squeezes time 4x but works in runs of 8 frames, so only 8k+1 frames come back as many: 9 make 3 latent frames and 9
again, 13 make 4 and 16. Its norms look at a whole run, so a clip is encoded whole, at the length that it is used at,
and the latent of the first frame alone is not the first latent of the clip.

Facts: diffusers 0.38 to 0.42, `AutoencoderKLCogVideoX`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fvgen.errors import UserError

RUN = 8  # frames
SQUEEZE = 4  # frames to a latent frame


def space_factor(vae: Mapping[str, Any]) -> int:
    """Pixels to a latent pixel, along each side."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def latent_size(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], frames: int, height: int, width: int
) -> tuple[int, int, int]:
    """F', h, w of clips that networks of these settings can take. Raises UserError for others."""
    if transformer["patch_size_t"] is not None:
        raise UserError("the transformer joins frames (CogVideoX 1.5 does); give a model of CogVideoX 1.0")
    if transformer["in_channels"] != 2 * vae["latent_channels"]:
        raise UserError(
            f"the transformer takes {transformer['in_channels']} channels, noisy and image latents together have "
            f"{2 * vae['latent_channels']}; give an image-to-video model"
        )
    if vae["temporal_compression_ratio"] != SQUEEZE or space_factor(vae) < SQUEEZE:
        raise UserError(f"the VAE does not squeeze time {SQUEEZE} times; give one of CogVideoX")
    if frames < RUN + 1 or frames % RUN != 1:
        near = max(RUN, RUN * round((frames - 1) / RUN)) + 1
        raise UserError(f"clips of {frames} frames do not fit this model, whose VAE takes 8k+1; give {near} frames")
    factor, patch = space_factor(vae), transformer["patch_size"]
    if height % (factor * patch) or width % (factor * patch):
        raise UserError(f"frames of {height}x{width} do not fit this model; use multiples of {factor * patch}")
    size = (frames - 1) // SQUEEZE + 1, height // factor, width // factor
    if transformer["use_learned_positional_embeddings"]:
        # The class refuses another h or w, but would replace its table without a word for another F'.
        own = transformer["sample_frames"], factor * transformer["sample_height"], factor * transformer["sample_width"]
        if (frames, height, width) != own:
            given, needed = ("{} frames of {}x{}".format(*each) for each in ((frames, height, width), own))
            raise UserError(f"clips of {given} do not fit this model, whose positions were learned; give {needed}")
    return size


def channel_statistics(vae: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation [C, 1, 1, 1] of the latents' channels, ``latents_mean`` and ``latents_std`` in the
    VAE's config, by which latents are shifted and divided; None where there are none, as in the published ones.
    Raises UserError for one without the other, and for those of another number of channels."""
    config = vae.config
    given, channels = [config.get(name) for name in ("latents_mean", "latents_std")], config["latent_channels"]
    if given == [None, None]:
        return None
    if not all(_numbers(x, channels) for x in given) or min(given[1]) <= 0:
        raise UserError(
            f"the VAE's latents_mean and latents_std do not fit its {channels} channels; give both, a number for each "
            "(those of latents_std above 0), or neither"
        )
    return tuple(torch.tensor(x, dtype=torch.float32).view(-1, 1, 1, 1) for x in given)


def _numbers(value: Any, count: int) -> bool:
    """Whether it is a list of so many finite numbers."""
    fits = isinstance(value, list | tuple) and len(value) == count
    return fits and all(isinstance(x, int | float) and math.isfinite(x) for x in value)


def encode(vae: nn.Module, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, C, F', h, w], float32 and unscaled, of frames [B, F, 3, H, W] in [0, 1].

    Clip by clip: the same bits whatever else is in the batch.
    """
    clips = (frames.transpose(1, 2) * 2 - 1).to(vae.dtype)
    posteriors = [vae.encode(clip).latent_dist for clip in clips.split(1)]
    mean, std = (torch.cat([getattr(each, name) for each in posteriors]).float() for name in ("mean", "std"))
    if (channels := channel_statistics(vae)) is None:
        return mean, std
    center, spread = (each.to(mean) for each in channels)
    return (mean - center) / spread, std / spread


def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Unscaled latents [B, C, F', h, w] to frames [B, 4F'-3, 3, H, W] in [0, 1], clamped, float32; clip by clip."""
    if (channels := channel_statistics(vae)) is not None:
        center, spread = (each.to(latents.device) for each in channels)
        latents = latents.float() * spread + center
    frames = torch.cat([vae.decode(clip).sample for clip in latents.to(vae.dtype).split(1)])
    frames = frames[:, :, 3 - SQUEEZE * latents.shape[2] :]  # an even F' gives three more, at the start
    return (frames.float().clamp(-1, 1) / 2 + 0.5).transpose(1, 2)
