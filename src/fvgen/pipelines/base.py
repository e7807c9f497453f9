"""What all pipelines share, teachers and students of any family: the frame of a call.

Frames are [B, F, 3, H, W] in [0, 1]; latents are [B, C, F', h, w], scaled, float32. A family says how they are encoded,
what a condition is, and which network stands between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fvgen.diffusion.samplers import Generators, OnStep, SamplerStep, normal
from fvgen.errors import UserError
from fvgen.models.condition import Condition
from fvgen.models.denoiser import Denoiser
from fvgen.pipelines.cameras import UNGUIDED, GivenCameras
from fvgen.pipelines.frames import (
    VideoOutput,
    answer,
    as_frames,
    check_output_type,
    check_parts,
    check_render,
    with_photographs,
)
from fvgen.pipelines.hub import FolderOnHub
from fvgen.pipelines.options import OnStepEnd
from fvgen.pipelines.strict import arguments_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from fvgen.diffusion.schedule import NoiseSchedule
    from fvgen.models.family import Family, LatentGrid

Sample = Callable[..., Tensor]


class NovelViewPipeline(FolderOnHub, DiffusionPipeline):
    """The base of all pipelines. A family's own class between this and its teacher or student fills in what follows."""

    family: ClassVar[Family]
    network_part: ClassVar[str]  # the component that is trained ...
    network: nn.Module  # ... and that itself
    settings: ClassVar[tuple[str, ...]] = ()  # what teacher and student have in common in ``model_index.json``
    lalrm: nn.Module | None = None  # makes 3D Gaussians of the latents
    wants_cameras = False  # whether `condition` takes, and needs, the cameras of the frames
    _callback_tensor_inputs: ClassVar = ["latents", "x0"]

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise levels, on the device that the pipeline runs on."""
        raise AttributeError(f"{type(self).__name__} has no schedule")

    def encode_frames(self, frames: Tensor, generator: Generators | None = None, noise: Tensor | None = None) -> Tensor:
        """Frames [B, F, 3, H, W] in [0, 1] to a posterior sample of scaled latents [B, C, F', h, w]."""
        raise AttributeError(f"{type(self).__name__} has no encoder")

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, F', h, w] to frames [B, F, 3, H, W] in [0, 1], clamped, float32."""
        raise AttributeError(f"{type(self).__name__} has no decoder")

    def condition(
        self,
        render: Tensor,
        generator: Generators | None = None,
        prompt: str | Sequence[str] | None = None,
        fps: int | None = None,
        reference: Tensor | None = None,
    ) -> Condition:
        """All that the network sees of renders [B, F, C, H, W] in [0, 1]; a model that `wants_cameras` takes them as
        the argument ``cameras``, see `fvgen.pipelines.cameras`."""
        raise AttributeError(f"{type(self).__name__} has no condition")

    def nulls(self, negative_prompt: str | None = None) -> tuple[Mapping[str, Tensor], ...]:
        """What takes the condition's place for guidance, see `fvgen.models.denoiser.Teacher`."""
        raise AttributeError(f"{type(self).__name__} has no null condition")

    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        """[B, C, F', h, w] of what is generated from ``condition``."""
        raise AttributeError(f"{type(self).__name__} has no latents")

    def check_clip(self, frames: int, height: int, width: int) -> None:
        """Raises UserError for clips that the networks cannot take."""
        raise AttributeError(f"{type(self).__name__} has no sizes")

    def check_render(self, render: Tensor) -> None:
        """Raises UserError for frames [B, F, C, H, W] with other channels than the model's."""
        if render.shape[2] != 3:
            raise UserError(f"render has shape {tuple(render.shape)}; give frames of three colours")

    def encoding_parts(self) -> Iterator[tuple[str, Any]]:
        """(name, network or setting) of all that goes into latents and conditions."""
        raise AttributeError(f"{type(self).__name__} has no encoders")

    @property
    def decoder(self) -> nn.Module:
        """The component that makes frames of latents."""
        raise AttributeError(f"{type(self).__name__} has no decoder")

    @property
    def latent_grid(self) -> LatentGrid:
        """What a latent stands for."""
        raise AttributeError(f"{type(self).__name__} has no latents")

    @property
    def frames(self) -> int:
        """How many frames a clip has that the network was trained with."""
        raise AttributeError(f"{type(self).__name__} has no number of frames")

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of the frames that it was trained with."""
        raise AttributeError(f"{type(self).__name__} has no size")

    @property
    def half_pixel_shift(self) -> bool:
        """Whether it was trained on renders of points that lie half a pixel off, see `fvgen.geometry.pointcloud`."""
        return False

    @property
    def holds_renders(self) -> bool:
        """Whether its conditions hold latents of the whole render, from which a leap can start."""
        return True

    @property
    def closed_renders(self) -> bool:
        """Whether its renders are to have no holes, see `fvgen.geometry.closing`."""
        return False

    def with_parts(self, **parts: Any) -> Self:
        """The same model with other components or settings, by name."""
        settings = {name: self.config[name] for name in arguments_of(type(self))[0] if name in self.config}
        return type(self)(**{**settings, **self.components, **parts})

    def with_network(self, network: nn.Module) -> Self:
        """The same model with another network."""
        return self.with_parts(**{self.network_part: network})

    def with_lalrm(self, lalrm: nn.Module) -> Self:
        """The same model, whose latents this `LaLRM` takes. Raises UserError where the family has no place for it."""
        raise UserError(f"models of the family {self.family.name} hold no LaLRM; give one of CogVideoX")

    def with_cameras(self, **settings: Any) -> Self:
        """The same with a network that is also guided by cameras, for `fvgen.distill.methods.camera` to train. Raises
        UserError where the family has none."""
        raise UserError(f"models of the family {self.family.name} cannot be guided by cameras; give one of CogVideoX")

    def denoiser(self) -> Denoiser:
        """The network, unguided."""
        return Denoiser(self.network, self.schedule, self.family.call)

    def idle_parts(self) -> Iterator[nn.Module]:
        """The components that training has no use for once the data are encoded."""
        return (x for name, x in self.components.items() if isinstance(x, nn.Module) and name != self.network_part)

    def encoder_fingerprint(self) -> str:
        """Twelve hex digits that change with any weight or setting that goes into latents or conditions, but for
        cameras, which no encoder has to do with."""
        digest = hashlib.sha256()
        for _, part in self.encoding_parts():
            if not isinstance(part, nn.Module):
                digest.update(str(part).encode())
                continue
            for key, tensor in sorted(part.state_dict().items()):
                digest.update(key.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def initial_noise(self, condition: Condition, generator: Generators, latents: Tensor | None = None) -> Tensor:
        """x_T, standard normal; a generator of the CPU, with a seed, gives the same clip on every device.

        `latents` are taken instead if they are given; UserError if their shape is not the condition's.
        """
        shape = self.latent_shape(condition)
        if latents is not None and tuple(latents.shape) != tuple(shape):
            raise UserError(f"latents have shape {tuple(latents.shape)}, this render needs {tuple(shape)}")
        like = next(iter(condition.values()))
        return (normal(shape, generator) if latents is None else latents).to(like.device, torch.float32)

    def _generate(
        self,
        render: Any,
        generator: Generators | None,
        steps: int,
        sample: Sample,
        *,
        photographs: Mapping[int, Any] | None = None,
        prompt: str | Sequence[str] | None = None,
        fps: int | None = None,
        reference: Tensor | None = None,
        cameras: GivenCameras = None,
        on_step: OnStep | None = None,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: str | None = None,
        return_dict: bool | None = None,
    ) -> Tensor | tuple | VideoOutput:
        """The body of all calls: check, encode, ``sample(condition, generator, on_step=...)``, decode, answer."""
        check_output_type(output_type)
        self._check_callback(callback_on_step_end_tensor_inputs)
        check_parts(self.components)
        render = with_photographs(as_frames(render), photographs)
        check_render(render)
        self.check_render(render)
        self.check_clip(render.shape[1], *render.shape[3:])
        generator = generator or torch.Generator().manual_seed(0)
        if cameras is not None and not self.wants_cameras:
            raise UserError(UNGUIDED)
        seen = {"cameras": cameras} if self.wants_cameras else {}
        condition = self.condition(render, generator, prompt, fps, reference, **seen)
        with self.progress_bar(total=steps) as bar:

            def told(step: SamplerStep) -> Tensor | None:
                bar.update()
                changed = None if on_step is None else on_step(step)
                if callback_on_step_end is None:
                    return changed
                tensors = {"latents": step.x if changed is None else changed, "x0": step.x0}
                given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                returned = callback_on_step_end(self, step.index, step.timestep, given) or {}
                return returned.get("latents", tensors["latents"])

            latents = sample(condition, generator, on_step=told)
        frames = latents if output_type == "latent" else self.decode_latents(latents)
        self.maybe_free_model_hooks()
        return answer(frames, output_type, return_dict)

    def _check_callback(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            known = ", ".join(self._callback_tensor_inputs)
            raise UserError(f"callback_on_step_end_tensor_inputs names {unknown[0]!r}; choose among {known}")


def unusual_settings(components: Mapping[str, Any], usual: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """The settings of components that differ from those in the table ``usual``, as (component.name, value), sorted:
    for `NovelViewPipeline.encoding_parts`, since they change latents without changing a weight."""
    return [
        (f"{part}.{name}", list(found) if isinstance(found, tuple) else found)  # as JSON gives them back
        for part, settings in sorted(usual.items())
        if components.get(part) is not None
        for name, value in sorted(settings.items())
        if (found := getattr(components[part].config, name, value)) != value
    ]
