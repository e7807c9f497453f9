"""A student of ViewCrafter's family that starts from the render."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import AutoencoderKL, AutoencoderTiny
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModel, CLIPVisionModelWithProjection

from fvgen.models.policy import DDPNet
from fvgen.models.viewcrafter.encoders import FixedPrompts
from fvgen.models.viewcrafter.pipelines import _ViewCrafterParts
from fvgen.models.viewcrafter.projector import ImageProjector
from fvgen.models.viewcrafter.unet import ViewCrafterUNet
from fvgen.pipelines.leap import LeapPipeline


class FVGenLeapPipeline(_ViewCrafterParts, LeapPipeline):
    """The student of `method: leap`. Arguments as `fvgen.models.cogvideox.videoscene.VideoScenePipeline` and
    `FVGenPipeline` have them."""

    _optional_components: ClassVar = [*_ViewCrafterParts._optional_components, "policy"]

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: ViewCrafterUNet,
        image_encoder: CLIPVisionModel | CLIPVisionModelWithProjection,
        image_projector: ImageProjector,
        prompts: FixedPrompts | None = None,
        text_encoder: CLIPTextModelWithProjection | None = None,
        tokenizer: CLIPTokenizer | None = None,
        fast_decoder: AutoencoderTiny | None = None,
        policy: DDPNet | None = None,
        base_scale: float | None = 0.7,
        image_resize: str = "viewcrafter",
        zero_snr: bool = True,
        prediction: str = "v",
        conditioning: Mapping[str, Any] | None = None,
        steps: int = 1,
        t: int = 459,
        t_max: int = 599,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self._keep(given)
        self.judge_settings()
