"""CogVideoX's pipelines: renders in, video out, by the multi-step guided teacher or the few-step student.

Frames are [B, F, 3, H, W] in [0, 1] with F = 8k+1; latents are [B, 16, F', h, w] with F' = 2k+1, scaled, float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)
from torch import Tensor, nn

from fvgen.diffusion.samplers import Generators, normal
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.errors import UserError, did_you_mean
from fvgen.models.cogvideox.camera import CameraTransformer
from fvgen.models.cogvideox.family import FAMILY, GUIDANCE, latent_grid, noise_schedule
from fvgen.models.cogvideox.prompts import EncodedPrompts
from fvgen.models.cogvideox.vae import channel_statistics, decode, encode, latent_size, space_factor
from fvgen.models.condition import Condition
from fvgen.models.family import LatentGrid
from fvgen.models.lalrm import LaLRM
from fvgen.pipelines.base import NovelViewPipeline, unusual_settings
from fvgen.pipelines.cameras import GivenCameras, camera_path
from fvgen.pipelines.student import StudentPipeline
from fvgen.pipelines.teacher import TeacherPipeline

if TYPE_CHECKING:
    from typing_extensions import Self

PARTS = ("vae", "transformer", "scheduler", "prompts", "policy", "lalrm")
IMAGES: Mapping[str, tuple[int, ...]] = {"renders": (), "first": (0,), "ends": (0, -1)}
"""`image_condition` -> the frames that it shows, each encoded alone and in the place of its own latent frame, zeros
elsewhere; of "renders" the whole clip."""

SIGMA_LOG = (-3.0, 0.5)  # mean and deviation of the logarithm of the noise on images

# Settings of the VAE, beside those that are always told, that change latents and show in no weight.
USUAL = {
    "vae": {
        **{"shift_factor": None, "latents_mean": None, "latents_std": None, "act_fn": "silu"},
        **{"norm_num_groups": 32, "norm_eps": 1e-6, "temporal_compression_ratio": 4},
    }
}


class _CogVideoXParts(NovelViewPipeline):
    """What teacher and student share: encoder, decoder, schedule, prompts.

    Args:
        vae: pixels to latents and back.
        transformer: predicts the velocity; a `CameraTransformer` looks at the cameras of the clip's frames.
        scheduler: its settings alone are used, for the noise levels.
        prompts: the encoded prompt and negative prompt.
        lalrm: makes 3D Gaussians of this VAE's latents, where there is one.
        image_condition: what the transformer's image channels hold, one of `IMAGES`: "renders" the latents of the
            render, "first" those of its first frame and zeros (as CogVideoX's image-to-video models learned it), "ends"
            those of first and last with zeros between (as in CogvideX-Interpolation and VideoScene).
        rotary_base: rows x columns of patches that rotary positions refer to, as "30x45"; "" for the size in the
            transformer's own settings.
        image_noise: add noise to the pixels that "first" and "ends" show, as CogvideX-Interpolation was trained: of
            strength exp(N(-3, 0.5)) in units of [-1, 1], one for all images of a clip.
    """

    family = FAMILY
    network_part = "transformer"
    _optional_components: ClassVar = ["lalrm"]
    settings = ("image_condition", "rotary_base", "image_noise")
    model_cpu_offload_seq = "transformer->vae"
    _exclude_from_cpu_offload: ClassVar = ["prompts", "lalrm"]

    def _keep(self, parts: Mapping[str, Any]) -> None:
        """``parts``: components and settings by name, as a class's own `__init__` was given them.

        Raises UserError for settings that are none, and for a LaLRM of another VAE's latents.
        """
        self.register_modules(**{name: part for name, part in parts.items() if name in PARTS})
        self.register_to_config(**{name: value for name, value in parts.items() if name not in PARTS})
        chosen = self.config.image_condition
        if chosen not in IMAGES:
            raise UserError(f"image_condition={chosen!r} is unknown{did_you_mean(str(chosen), IMAGES)}")
        channel_statistics(self.vae)  # judged
        self.wants_cameras = isinstance(self.transformer, CameraTransformer)
        self.transformer.rotary_base = _base(self.config.rotary_base)
        nn.Module.to(self.transformer, self.transformer.dtype)  # diffusers makes tables of positions in float64
        if self.lalrm is not None and (taken := self.lalrm.latent_grid) != self.latent_grid:
            made = "{} channels, {} frames and {} pixels to a latent".format
            raise UserError(
                f"the LaLRM takes latents of {made(*taken)}, and this VAE makes those of {made(*self.latent_grid)}; "
                "give the one that it was trained beside"
            )

    def with_lalrm(self, lalrm: LaLRM) -> Self:
        return self.with_parts(lalrm=lalrm)

    @property
    def closed_renders(self) -> bool:
        """A network that does not see the render has it for nothing but a leap's start, which must have no holes."""
        return bool(IMAGES[self.config.image_condition])

    @property
    def network(self) -> CogVideoXTransformer3DModel:
        return self.transformer

    @property
    def schedule(self) -> NoiseSchedule:
        return noise_schedule(self.scheduler.config).to(self._execution_device)

    @torch.no_grad()
    def encode_frames(self, frames: Tensor, generator: Generators | None = None, noise: Tensor | None = None) -> Tensor:
        """Frames [B, F, 3, H, W] in [0, 1] to a posterior sample of scaled latents [B, 16, F', h, w].

        The sample is the mean plus the standard deviation times `noise` [B, 16, F', h, w], drawn if it is not given.
        """
        return self._sample(frames, generator, noise) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, 16, F', h, w] to frames [B, F, 3, H, W] in [0, 1], clamped, float32."""
        # A decoder on a GPU stays there; one that waits on the CPU is fetched by its hook or is to work there.
        device = self.vae.device if self.vae.device.type == "cuda" else self._execution_device
        return decode(self.vae, latents.to(device) / self.vae.config.scaling_factor)

    @torch.no_grad()
    def condition(
        self,
        render: Tensor,
        generator: Generators | None = None,
        prompt: str | Sequence[str] | None = None,
        fps: int | None = None,
        reference: Tensor | None = None,
        cameras: GivenCameras = None,
    ) -> Condition:
        """All that the transformer sees of renders [B, F, 3, H, W] in [0, 1], and what a leap starts from.

        ``text_tokens`` [1, N, D], ``image_latents`` [B, 16, F', h, w] as `image_condition` says, which 1.5's models
        (`invert_scale_latents`) want divided by the scaling factor; beside "first" and "ends" also ``render_latents``
        [B, 16, F', h, w], those of the whole render, which the transformer does not see.

        reference: photographs [n, 3, H, W] or [B, n, 3, H, W] in [0, 1] to show in place of the render's own frames,
        n = 1 for "first" and 2 for "ends".

        cameras: of the F frames at H x W, for all clips or one path each, where `wants_cameras`; the condition then has
        ``camera_path`` [1 or B, F, 21], the path as its first camera sees it and of size 1.

        Drawn are, in this order, the noise's strength, for each image its noise and its posterior, the render's own
        posterior.
        """
        shown = IMAGES[self.config.image_condition]
        if reference is not None and not shown:
            raise UserError("this model looks at no photograph beside the clip; leave the reference out")
        if fps is not None:
            raise UserError(f"fps={fps} has no effect: this model has no frame rate; leave it out")
        text = self.text_tokens(prompt).to(self._execution_device)
        factor = self.vae.config.scaling_factor
        images = self._image_latents(_images(render, shown, reference), generator) if shown else []
        whole = self._sample(render, generator)
        latents = torch.zeros_like(whole) if shown else whole
        for index, image in zip(shown, images, strict=True):
            latents[:, :, index] = image
        scaled = latents / factor if self.vae.config.invert_scale_latents else latents * factor
        beside = whole * factor if shown else None
        path = camera_path(self.wants_cameras, cameras, render)
        path = None if path is None else path.to(self._execution_device)
        return Condition(image_latents=scaled, text_tokens=text, render_latents=beside, camera_path=path)

    def text_tokens(self, prompt: str | Sequence[str] | None = None) -> Tensor:
        """[1, N, D] of the model's prompt (None) or negative prompt (""). Raises UserError for another text."""
        if prompt is None:
            return self.prompts.positive
        if prompt == "":
            return self.prompts.negative
        raise UserError(f"prompt {prompt!r} cannot be encoded: this model has no text encoder; leave it out")

    def nulls(self, negative_prompt: str | None = None) -> tuple[Mapping[str, Tensor], ...]:
        """The negative prompt; image latents stay as they are."""
        return ({"text_tokens": self.text_tokens(negative_prompt or "").to(self._execution_device)},)

    def encoding_parts(self) -> Iterator[tuple[str, Any]]:
        yield "image_condition", self.config.image_condition
        yield "scaling_factor", self.vae.config.scaling_factor
        yield "invert_scale_latents", self.vae.config.invert_scale_latents
        if IMAGES[self.config.image_condition]:
            yield "beside", f"render_latents, image_noise={self.config.image_noise}"
        if unusual := unusual_settings(self.components, USUAL):
            yield "settings", unusual
        yield "vae", self.vae
        yield "prompts", self.prompts

    def with_cameras(self, copy_blocks: bool = True, **settings: Any) -> Self:
        """The same with a `CameraTransformer` made of the transformer (`CameraTransformer.from_base`), which starts as
        the same model; as it is if it has one, of these settings. Raises UserError for one of others."""
        if not self.wants_cameras:
            settings["space_factor"] = space_factor(self.vae.config)
            return self.with_network(CameraTransformer.from_base(self.transformer, copy_blocks, **settings))
        for name, value in settings.items():
            if (found := self.transformer.config[name]) != value:
                raise UserError(f"{name}={value}, but the teacher is guided by cameras with {name}={found}; give that")
        return self

    @property
    def decoder(self) -> nn.Module:
        return self.vae

    @property
    def frame_size(self) -> tuple[int, int]:
        config, factor = self.transformer.config, space_factor(self.vae.config)
        return config.sample_height * factor, config.sample_width * factor

    @property
    def frames(self) -> int:
        return self.transformer.config.sample_frames

    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        return tuple(condition["image_latents"].shape)

    def check_clip(self, frames: int, height: int, width: int) -> None:
        """Raises UserError for clips of other than 8k+1 frames, or whose sides VAE and patches do not divide; a
        transformer with learned positions takes one size alone."""
        latent_size(self.transformer.config, self.vae.config, frames, height, width)

    @property
    def latent_grid(self) -> LatentGrid:
        return latent_grid(self.vae.config)

    @property
    def size_multiple(self) -> int:
        """Frame height and width must be multiples of this."""
        return space_factor(self.vae.config) * self.transformer.config.patch_size

    def _sample(self, frames: Tensor, generator: Generators | None, noise: Tensor | None = None) -> Tensor:
        """A posterior sample [B, 16, F', h, w], unscaled."""
        mean, std = encode(self.vae, frames.to(self._execution_device))
        noise = normal(mean.shape, generator) if noise is None else noise
        return mean + std * noise.to(mean)

    def _image_latents(self, images: Tensor, generator: Generators | None) -> list[Tensor]:
        """Of images [B, n, 3, H, W], each encoded alone: n times [B, 16, h, w], unscaled."""
        sigma, latents = None, []
        if self.config.image_noise:
            sigma = (SIGMA_LOG[0] + SIGMA_LOG[1] * normal((len(images), 1, 1, 1, 1), generator)).exp().to(images.device)
        for image in images.split(1, dim=1):
            if sigma is not None:
                image = image + sigma * normal(image.shape, generator).to(image) / 2  # a unit there is half of one here
            latents.append(self._sample(image, generator).squeeze(2))
        return latents


class CogVideoXTeacherPipeline(_CogVideoXParts, TeacherPipeline):
    """The teacher: deterministic DDIM with classifier-free guidance, two network evaluations a step.

    Args:
        steps, guidance, guidance_rescale, camera_guidance: what a call uses where it is not told otherwise; the last is
            for a `CameraTransformer`.
    """

    eta = 0.0
    denoise_last = True

    def __init__(
        self,
        vae: AutoencoderKLCogVideoX,
        transformer: CogVideoXTransformer3DModel | CameraTransformer,
        scheduler: CogVideoXDDIMScheduler | CogVideoXDPMScheduler,
        prompts: EncodedPrompts,
        lalrm: LaLRM | None = None,
        image_condition: str = "renders",
        rotary_base: str = "",
        image_noise: bool = False,
        steps: int = 50,
        guidance: float = GUIDANCE,
        guidance_rescale: float = 0.0,
        camera_guidance: float = 1.0,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self._keep(given)


class CogVideoXStudentPipeline(_CogVideoXParts, StudentPipeline):
    """The student: a few steps of x0-prediction and re-noising, no guidance, one network evaluation a step.

    Args:
        steps: what a call uses where it is not told otherwise; 1, 2, 4 and 8 are usual.
    """

    def __init__(
        self,
        vae: AutoencoderKLCogVideoX,
        transformer: CogVideoXTransformer3DModel | CameraTransformer,
        scheduler: CogVideoXDDIMScheduler | CogVideoXDPMScheduler,
        prompts: EncodedPrompts,
        lalrm: LaLRM | None = None,
        image_condition: str = "renders",
        rotary_base: str = "",
        image_noise: bool = False,
        steps: int = 4,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self._keep(given)


def _images(render: Tensor, shown: Sequence[int], reference: Tensor | None) -> Tensor:
    """[B, n, 3, H, W]: what is shown of a clip. Raises UserError for photographs that are not as many or as large."""
    if reference is None:
        return render[:, list(shown)]
    wanted = (len(shown), *render.shape[2:])
    if tuple(reference.shape[-4:]) != wanted or reference.ndim > 5:
        raise UserError(
            f"reference has shape {tuple(reference.shape)}; this model shows {len(shown)} photographs of the render's "
            f"size, {wanted}: resize and crop them to it"
        )
    return reference.to(render).expand(len(render), *wanted)


def _base(text: str) -> tuple[int, int] | None:
    """ "30x45" to (30, 45), "" to None. Raises UserError for anything else."""
    if text == "":
        return None
    parts = str(text).split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"rotary_base={text!r} is not understood; write, for example, 30x45, or nothing")
    return int(parts[0]), int(parts[1])
