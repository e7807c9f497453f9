"""VideoScene's pipeline (Wang et al. 2025): a coarse reconstruction's render, noised, to a clip in one evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)

from fvgen.models.cogvideox.camera import CameraTransformer
from fvgen.models.cogvideox.pipelines import _CogVideoXParts
from fvgen.models.cogvideox.prompts import EncodedPrompts
from fvgen.models.lalrm import LaLRM
from fvgen.models.policy import DDPNet
from fvgen.pipelines.leap import LeapPipeline

RELEASED: Mapping[str, Mapping[str, Any]] = {
    "demo": {"t": 459, "image_noise": True},
    "re10k": {"t": 549, "image_noise": True},
}
"""What the public inference code fixes: of its demo, whose images are the render's own ends, and of its RealEstate10K
test, whose images are the photographs (``reference`` of a call). It has no DDPNet."""


class VideoScenePipeline(_CogVideoXParts, LeapPipeline):
    """The student of `method: leap`, or VideoScene's own weights.

    Args:
        policy: chooses t clip by clip.
        image_noise: see the other pipelines; trained with, here off where nobody asks for it.
        steps: evaluations of the network; 1 is what it was made for.
        t: where to land. t_max: the largest t that the student was trained on.
    """

    closed_renders = True
    settings = ("image_condition", "rotary_base")
    _optional_components: ClassVar = ["policy", "lalrm"]
    model_cpu_offload_seq = "policy->transformer->vae"

    def __init__(
        self,
        vae: AutoencoderKLCogVideoX,
        transformer: CogVideoXTransformer3DModel | CameraTransformer,
        scheduler: CogVideoXDDIMScheduler | CogVideoXDPMScheduler,
        prompts: EncodedPrompts,
        policy: DDPNet | None = None,
        lalrm: LaLRM | None = None,
        image_condition: str = "ends",
        rotary_base: str = "",
        image_noise: bool = False,
        steps: int = 1,
        t: int = 459,
        t_max: int = 599,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self._keep(given)
        self.judge_settings()
