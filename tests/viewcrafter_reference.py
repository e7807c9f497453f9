"""ViewCrafter's recorded tiny models in our classes, for the tests that compare with them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fvgen.convert.names import KEY_MAPS
from fvgen.convert.sizes import unet_config
from fvgen.models.viewcrafter.unet import ViewCrafterUNet


def reference_folder(shared: Path) -> Path:
    return shared / "reference" / "viewcrafter"


def recording(shared: Path, name: str) -> dict[str, Tensor]:
    return load_file(reference_folder(shared) / f"{name}.safetensors")


def settings(shared: Path, name: str) -> dict:
    return json.loads((reference_folder(shared) / f"{name}.json").read_text())


def reference_weights(shared: Path, name: str) -> dict[str, Tensor]:
    """The state dict of the recorded UNet `name` in ViewCrafter's names, float32."""
    weights: dict[str, Tensor] = {}
    for part in sorted(reference_folder(shared).glob(f"unet_{name}_weights*")):
        weights |= load_file(part)
    return {key: value.float() for key, value in weights.items()}


def reference_unet(shared: Path, name: str) -> ViewCrafterUNet:
    """The recorded UNet `name` ("tiny" or "deep") with its weights, in evaluation mode."""
    unet = ViewCrafterUNet(**unet_config(settings(shared, f"unet_{name}_config")["params"]))
    unet.load_state_dict(KEY_MAPS["unet"].to_ours(reference_weights(shared, name)))
    return unet.eval()


def tiny_clip_weights(shared: Path, part: str) -> dict[str, Tensor]:
    """The state dict of the recorded "text" or "image" tower in ViewCrafter's names, float32."""
    weights = recording(shared, f"clip_{part}_tiny_weights")
    return {key.removeprefix("model."): value.float() for key, value in weights.items()}


def small_unet(**changes) -> ViewCrafterUNet:
    """A seeded small UNet in which no layer is left at zero, so that every path shows in the output."""
    torch.manual_seed(0)
    config = dict(
        model_channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_head_channels=8,
        context_dim=6,
        dropout=0.0,
        text_tokens=5,
        norm_num_groups=4,
        init_attn_heads=1,
    )
    unet = ViewCrafterUNet(**(config | changes))
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return unet.eval()
