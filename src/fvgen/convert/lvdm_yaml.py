"""Configuration files of ViewCrafter, DynamiCrafter and GenFusion: which networks of which sizes, and which model.

A file describes more than this library can build: every switch that would make another network or another diffusion is
compared with the published value, and refused where it differs. A switch that a file leaves out has the default of the
class that it configures, which is often another one. Sizes are free.

The sizes of the CLIP towers are not in the file, which names a model of open_clip at most; for other sizes give
open_clip's own description of a model (`embed_dim`, `vision_cfg`, `text_cfg`) as `model_cfg` in their `params`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from fvgen.convert.components import COMPONENTS, VAE_SWITCHES, Switches
from fvgen.convert.kinds import KINDS, Kind, check_layout, kind_of
from fvgen.convert.sizes import VIT_H_14, image_config, projector_config, text_config, unet_config, vae_config
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.errors import UserError, first_line, short
from fvgen.models.viewcrafter.projector import ImageProjector
from fvgen.models.viewcrafter.unet import ViewCrafterUNet
from fvgen.pipelines.strict import judge_arguments, judge_settings
from fvgen.system.doors import Unreadable, read_yaml

WANTED = "give a configuration file of ViewCrafter, DynamiCrafter or GenFusion"
DAMAGED = f"the yaml {{path}} is damaged ({{reason}}); {WANTED}"


@dataclass(frozen=True)
class LvdmConfig:
    """What a configuration file says: which model it is, and how to build each component (on the default device)."""

    kind: Kind
    base_scale: float | None  # None: its latents have no dynamic scale
    builders: dict[str, Callable[[], nn.Module]]
    open_clip: Mapping[str, Any]  # open_clip's description of the second CLIP, `embedder`

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise levels with which the checkpoint was trained."""
        return NoiseSchedule.lvdm(
            self.base_scale, self.kind.stated("rescale_betas_zero_snr"), self.kind.stated("parameterization")
        )

    def build_empty(self, component: str) -> nn.Module:
        """The component without weights, on the meta device."""
        with torch.device("meta"):
            return self.builders[component]().eval()


def read_lvdm_config(path: str | Path, layout: str | None = None) -> LvdmConfig:
    """Read a yaml.

    Args:
        path: the file.
        layout: "ends" for DynamiCrafter's interpolation model, which is published with the yaml of another one.

    Raises:
        UserError: a file that is damaged, describes another model, or one that has another layout.
    """
    try:
        content = read_yaml(path)
    except Unreadable as error:
        raise UserError(DAMAGED.format(path=path, reason=error.reason)) from error
    try:
        return _lvdm_config(content, path, layout)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, UserError):
            raise
        reason = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(DAMAGED.format(path=path, reason=reason)) from error


def _lvdm_config(content: Any, path: str | Path, layout: str | None) -> LvdmConfig:
    model = content["model"]
    # A yaml with interp_mode is the interpolation model's own, for training; the published one leaves it out.
    params = {**model["params"], **({"interp_mode": True} if layout == "ends" else {})}
    kind = kind_of(str(model["target"]), params)
    if kind is None:
        known = " or ".join(dict.fromkeys(kind.target for kind in KINDS))
        raise UserError(f"the yaml {path} is of another model: its model is {str(model['target'])[:100]}, not {known}")
    check_layout(kind, layout, path)
    _check_switches(params, kind.switches, "model", kind, path)
    sections = {}
    for component, row in COMPONENTS.items():
        _check_class(params[row.section], row.target, row.section, path)
        sections[component] = params[row.section].get("params") or {}
        _check_switches(sections[component], row.switches, row.section, kind, path)
    if kind.stated("use_dynamic_rescale"):
        judge_settings({"base_scale": params["base_scale"]}, {"base_scale": 0.7}, f"the yaml {path}")
    return LvdmConfig(
        kind,
        float(params["base_scale"]) if kind.stated("use_dynamic_rescale") else None,
        _builders(kind, sections, params["scale_factor"], path),
        _open_clip(sections["image_encoder"], path),
    )


def _builders(
    kind: Kind, sections: Mapping[str, Mapping[str, Any]], scale_factor: float, path: str | Path
) -> dict[str, Callable[[], nn.Module]]:
    unet, vae = unet_config(sections["unet"]), sections["vae"]
    if kind.default_fps is not None:
        unet["default_fps"] = kind.default_fps
    _check_switches(vae["ddconfig"], VAE_SWITCHES, "first_stage_config", kind, path)
    if vae["embed_dim"] != vae["ddconfig"]["z_channels"]:
        raise UserError(f"the yaml {path} has another embed_dim than z_channels, which AutoencoderKL cannot have")
    vae = vae_config(vae, scale_factor)
    if kind.vae_channels is not None:
        vae |= {"in_channels": kind.vae_channels, "out_channels": kind.vae_channels}
    image, text = (_open_clip(sections[name], path) for name in ("image_encoder", "text_encoder"))
    kinds = {
        "unet": (ViewCrafterUNet, unet),
        "vae": (AutoencoderKL, vae),
        "image_projector": (ImageProjector, projector_config(sections["image_projector"])),
        "image_encoder": (CLIPVisionModelWithProjection, image_config(image)),
        "text_encoder": (CLIPTextModelWithProjection, text_config(text)),
    }
    for name, (cls, settings) in kinds.items():
        judge_arguments(cls, settings, f"the yaml {path}, {name}")
    return {
        name: partial(_build, cls, cls.config_class, settings)
        if hasattr(cls, "config_class")
        else partial(cls, **settings)
        for name, (cls, settings) in kinds.items()
    }


def _build(model: type, config: type, settings: dict) -> nn.Module:
    return model(config(**settings))


def _open_clip(params: Mapping[str, Any], path: str | Path) -> Mapping[str, Any]:
    """open_clip's description of a tower's model."""
    if "model_cfg" in params:
        return params["model_cfg"]
    arch = params.get("arch", "ViT-H-14")
    if arch != "ViT-H-14":
        raise UserError(
            f"the yaml {path} names the open_clip model {arch}, only ViT-H-14 is known here; give its description "
            "(embed_dim, vision_cfg, text_cfg) as model_cfg beside arch"
        )
    return VIT_H_14


def _check_class(section: Mapping[str, Any], expected: str, name: str, path: str | Path) -> None:
    found = str(section["target"])
    if found.rsplit(".", 1)[-1] != expected:
        raise UserError(f"the yaml {path} is of another model: its {name} is {found[:100]}, not {expected}")


def _check_switches(params: Mapping[str, Any], switches: Switches, name: str, kind: Kind, path: str | Path) -> None:
    for key, (value, default) in switches.items():
        found = params.get(key, default)
        if found != value:
            told = (
                f"{name} has {key}={short(found)}" if key in params else f"{name} has no {key}, which means {default!r}"
            )
            raise UserError(f"the yaml {path} is of another model: {told}, {kind.name}'s is {value!r}")
