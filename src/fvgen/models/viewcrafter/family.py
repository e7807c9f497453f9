"""ViewCrafter's row in the table of families: a UNet that sees renders' latents beside the noisy ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.errors import UserError
from fvgen.models.condition import Condition
from fvgen.models.denoiser import Prediction
from fvgen.models.family import Blueprint, Family, LatentGrid, Size

LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out", "to_k_image", "to_v_image", "proj_in", "proj_out", "net.0.proj", "net.2"),
    *("conv1", "conv2"),
)  # all linear layers of the transformers and the residual blocks' spatial convolutions
MIDDLE = "middle"
LEAP = "FVGenLeapPipeline"


def call(
    network: nn.Module,
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
    taps: Sequence[str] = (),
    stop: bool = False,
    cut: bool = False,
) -> Prediction:
    """Noisy latents and ``render_latents`` [B, 4, F, h, w] on the channels; ``text_tokens`` [B, M, D] and
    ``image_tokens`` [B, N, D] as one context; ``fps`` [B] where it is given."""
    dtype = next(network.parameters()).dtype
    everything = condition.expanded(len(x_t))
    sample = torch.cat([x_t.to(dtype), everything["render_latents"].to(dtype)], dim=1)
    tokens = [everything[name] for name in ("text_tokens", "image_tokens") if name in everything]
    context = torch.cat(tokens, dim=1).to(dtype)
    output = network(sample, t, context, everything.get("fps"), taps=tuple(taps), only_taps=stop, cut=cut)
    return Prediction(output.sample, output.features)


def tap_widths(network: nn.Module) -> dict[str, int]:
    """Every stage of the UNet is a tap."""
    return network.tap_widths


def blueprint(files: Mapping[str, Mapping[str, Any]]) -> Blueprint:
    """From the JSON files of a model folder, by component."""
    index, unet, vae = files.get("", {}), files["unet"], files["vae"]
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    settings = {key: value for key, value in unet.items() if not key.startswith("_")}

    def network() -> nn.Module:
        from fvgen.models.viewcrafter.unet import ViewCrafterUNet

        return ViewCrafterUNet(**settings)

    def example(size: Size) -> tuple[Tensor, Condition]:
        from fvgen.models.viewcrafter.unet import IMAGE_TOKENS_PER_FRAME

        with torch.device("meta"):
            config = network().config
        multiple = factor * 2 ** (len(config.channel_mult) - 1)
        if size.height % multiple or size.width % multiple:
            raise UserError(f"frames of {size.height}x{size.width} do not fit this model; use multiples of {multiple}")
        shape = (size.batch, config.out_channels, size.frames, size.height // factor, size.width // factor)
        text = torch.zeros(1, config.text_tokens, config.context_dim)
        image = torch.zeros(size.batch, IMAGE_TOKENS_PER_FRAME * size.frames, config.context_dim)
        return torch.zeros(shape), Condition(render_latents=torch.zeros(shape), text_tokens=text, image_tokens=image)

    def schedule() -> NoiseSchedule:
        return NoiseSchedule.lvdm(
            index.get("base_scale", 0.7), index.get("zero_snr", True), index.get("prediction", "v")
        )

    grid = LatentGrid(vae.get("latent_channels", 4), 1, factor)
    return Blueprint(network, example, schedule, float(index.get("guidance", 7.5)), grid)


def pipeline(class_name: str) -> type[Any]:
    """One of the pipeline classes."""
    module = "leap" if class_name == LEAP else "pipelines"
    return getattr(import_module(f"fvgen.models.viewcrafter.{module}"), class_name)


FAMILY = Family(
    name="viewcrafter",
    teachers=("ViewCrafterPipeline",),
    students=("FVGenPipeline", LEAP),
    pipeline=pipeline,
    call=call,
    tap_widths=tap_widths,
    default_tap=lambda network: MIDDLE,
    lora_targets=LORA_TARGETS,
    blueprint=blueprint,
    published={"viewcrafter": {"": {}, "unet": {}, "vae": {"block_out_channels": (128, 256, 512, 512)}}},
    start=lambda condition: condition["render_latents"],
    leap=LEAP,
)
