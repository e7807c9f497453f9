"""The published models of ViewCrafter's family, one row each: how its own code conditions it and samples from it.

All are one UNet class. A yaml says which noise schedule a model has; most of how it is used is in its repository's
scripts alone, and therefore written down here. docs/teachers.md says the same in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fvgen.errors import UserError
from fvgen.models.viewcrafter.conditioning import Conditioning

# Key of a yaml's model.params: (the value that all have, the class's default where the key is absent).
MODEL_SWITCHES = {
    "beta_schedule": ("linear", "linear"),
    "linear_start": (0.00085, 1e-4),
    "linear_end": (0.012, 2e-2),
    "timesteps": (1000, 1000),
    "turning_step": (400, 400),
    "conditioning_key": ("hybrid", "crossattn"),
    "scale_by_std": (False, False),
    "use_ema": (False, True),
    "uncond_type": ("empty_seq", "empty_seq"),
    "encoder_type": ("2d", "2d"),
}
# The same for keys in which rows differ: (the value that most have, the default).
VARYING = {
    "parameterization": ("v", "eps"),
    "rescale_betas_zero_snr": (True, False),
    "use_dynamic_rescale": (True, False),
    "interp_mode": (False, False),
    "first_stage_depth_key": (None, None),
}
NO_TEXT = ""  # what DynamiCrafter's command line encodes where no text is given


@dataclass(frozen=True)
class Kind:
    """A published model, or several that are used alike.

    Args:
        name: for messages.
        target: class that its yaml names.
        conditioning: see there.
        mark: the key of `VARYING` that tells it from others of its class; None for the one that is left.
        states: its values of `VARYING` that are not most models'.
        default_fps: what its scripts give as frame rate; None: what its yaml says.
        vae_names: "diffusers" where its code ignores the yaml's VAE and takes diffusers' with `vae_channels`.
        steps, spacing, guidance, guidance_rescale, keep_last_scale: as in `ViewCrafterPipeline`.
    """

    name: str
    target: str
    conditioning: Conditioning
    mark: str | None = None
    states: Mapping[str, Any] = field(default_factory=dict)
    default_fps: int | None = None
    vae_names: str = "lvdm"
    vae_channels: int | None = None
    steps: int = 50
    spacing: str = "trailing"
    guidance: float = 7.5
    guidance_rescale: float = 0.7
    keep_last_scale: bool = True

    def stated(self, key: str) -> Any:
        """The value of a key of `VARYING`."""
        return self.states.get(key, VARYING[key][0])

    @property
    def switches(self) -> dict[str, tuple[Any, Any]]:
        """Key of the yaml's model.params: (the value that it must have, the class's default)."""
        return MODEL_SWITCHES | {key: (self.stated(key), default) for key, (_, default) in VARYING.items()}

    def pipeline_settings(self, base_scale: float | None) -> dict[str, Any]:
        """Arguments of `ViewCrafterPipeline` beside its networks."""
        sampling = ("steps", "spacing", "guidance", "guidance_rescale", "keep_last_scale")
        return {
            **{name: getattr(self, name) for name in sampling},
            "base_scale": base_scale,
            "zero_snr": self.stated("rescale_betas_zero_snr"),
            "prediction": self.stated("parameterization"),
            "image_resize": "viewcrafter",
            "conditioning": asdict(self.conditioning),
        }


VIEWCRAFTER, DYNAMICRAFTER = "VIPLatentDiffusion", "LatentVisualDiffusion"
KINDS = (
    Kind("ViewCrafter", VIEWCRAFTER, Conditioning(), keep_last_scale=False),
    Kind(
        "GenFusion",
        DYNAMICRAFTER,
        Conditioning("renders_rgbd", "image", "reference", None),
        mark="first_stage_depth_key",
        # It says interp_mode as well, but gives that branch of the code the whole clip instead of its ends.
        states={"first_stage_depth_key": "gt_depth", "interp_mode": True},
        vae_names="diffusers",
        vae_channels=4,
        steps=25,
        spacing="uniform",
        guidance=3.2,
    ),
    Kind(
        "DynamiCrafter_512_Interp",
        DYNAMICRAFTER,
        Conditioning("ends", prompt=NO_TEXT),
        mark="interp_mode",
        states={"interp_mode": True},
        default_fps=5,
    ),
    Kind(
        "DynamiCrafter_256",
        DYNAMICRAFTER,
        Conditioning("first_frame", prompt=NO_TEXT),
        mark="parameterization",
        states={"parameterization": "eps", "rescale_betas_zero_snr": False, "use_dynamic_rescale": False},
        spacing="uniform",
        guidance_rescale=0.0,
    ),
    Kind("DynamiCrafter", DYNAMICRAFTER, Conditioning("first_frame", prompt=NO_TEXT)),
)


def kind_of(target: str, params: Mapping[str, Any]) -> Kind | None:
    """The row that a yaml's model.target and model.params point to, to be compared in full; None for another class."""
    rows = [kind for kind in KINDS if kind.target == target.rsplit(".", 1)[-1]]
    marked = (
        kind for kind in rows if kind.mark and params.get(kind.mark, VARYING[kind.mark][1]) == kind.states[kind.mark]
    )
    return next(marked, rows[-1] if rows else None)


def vae_names(layout: str) -> str:
    """How the file of a model with this layout names the VAE's weights: "lvdm" or "diffusers"."""
    return next(kind.vae_names for kind in KINDS if kind.conditioning.layout == layout)


def check_layout(kind: Kind, layout: str | None, path: object) -> None:
    """Raises UserError for a layout that was asked for and that the model does not have."""
    if layout not in (None, kind.conditioning.layout):
        raise UserError(
            f"the yaml {path} is of {kind.name}, whose layout is {kind.conditioning.layout} and not {layout}; "
            "leave --layout out, or give the yaml of another model"
        )
