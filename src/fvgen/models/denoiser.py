"""The UNet as a denoiser: clean latents in every caller's hands, velocities only in here.

`Denoiser` is what student, fake score and teacher have in common; `Teacher` adds guidance and is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fvgen.diffusion.samplers import guided_velocity, guided_velocity_three_way
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.errors import UserError

if TYPE_CHECKING:  # a Denoiser takes any network that is called like it
    from fvgen.models.viewcrafter.unet import ViewCrafterUNet


@dataclass(frozen=True, eq=False)
class Condition:
    """What a clip is generated from."""

    render_latents: Tensor  # [B, 4, F, h, w] scaled latents of the renders, photographs in place of known frames
    context: Tensor  # [B, N, D] text tokens, then image tokens
    fps: Tensor | None = None  # [B]; None means the UNet's default

    def to(self, device: torch.device | str) -> Condition:
        """The same condition on another device."""
        return Condition(*(x if x is None else x.to(device) for x in (self.render_latents, self.context, self.fps)))

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        """A part of the batch."""
        return Condition(*(x if x is None else x[rows] for x in (self.render_latents, self.context, self.fps)))


def stack_contexts(condition: Condition, *contexts: Tensor) -> Condition:
    """The condition's clips once with each of the contexts [1 or B, N, D], one batch after the other."""
    batch, times = condition.render_latents.shape[0], len(contexts)
    return Condition(
        condition.render_latents.repeat(times, 1, 1, 1, 1),
        torch.cat([context.expand(batch, -1, -1) for context in contexts]),
        None if condition.fps is None else condition.fps.repeat(times),
    )


class Denoiser(nn.Module):
    """A UNet and its noise schedule: (x_t, t, condition) -> clean latents x0.

    Latents are [B, 4, F, h, w] and t is [B] integers. The network runs in the type of its weights, everything around it
    in float32.
    """

    def __init__(self, unet: ViewCrafterUNet, schedule: NoiseSchedule):
        super().__init__()
        self.unet = unet
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predicted clean latents."""
        return self.schedule.to(x_t.device).x0_from_v(x_t, self.velocity(x_t, t, condition), t)

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output as a velocity, [B, 4, F, h, w] float32."""
        output = self.unet(*self._inputs(x_t, t, condition)).sample.float()
        return self.schedule.to(x_t.device).as_velocity(x_t, output, t)

    def features(self, x_t: Tensor, t: Tensor, condition: Condition, tap: str = "middle") -> Tensor:
        """Features [B, C, F, h', w'] of one stage of the UNet, which stops there."""
        return self.unet.features(*self._inputs(x_t, t, condition), tap=tap)

    def _inputs(self, x_t: Tensor, t: Tensor, condition: Condition) -> tuple:
        dtype = next(self.unet.parameters()).dtype
        sample = torch.cat([x_t.to(dtype), condition.render_latents.to(dtype)], dim=1)
        return sample, t, condition.context.to(dtype), condition.fps


class Teacher(Denoiser):
    """A frozen denoiser with classifier-free guidance: no gradients of its weights, never in training mode.

    Gradients still flow through it to its inputs, as the discriminator needs. `features` are those of the conditional
    pass, without guidance.

    Args:
        unet: becomes frozen.
        null_context: [1, N, D] (or one per clip) context of the unconditional pass: tokens of the empty text and of a
            mid-grey image. The render latents stay as they are. None allows only guidance 1.
        guidance: 1 skips the unconditional pass and the rescale.
        rescale: guidance rescale, 0 for none.
        image_guidance: separate weight for the image tokens, at the price of a third evaluation.
    """

    def __init__(
        self,
        unet: ViewCrafterUNet,
        schedule: NoiseSchedule,
        null_context: Tensor | None = None,
        guidance: float = 7.5,
        rescale: float = 0.7,
        image_guidance: float | None = None,
    ):
        super().__init__(unet.requires_grad_(False), schedule)
        if guidance != 1.0 and null_context is None:
            raise UserError(f"The teacher has guidance {guidance} but no null context: give one, or set guidance to 1.")
        self.guidance, self.rescale, self.image_guidance = guidance, rescale, image_guidance
        self.register_buffer("null_context", null_context, persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    @property
    def nfe(self) -> int:
        """Network evaluations per call and clip."""
        if self.guidance == 1.0:
            return 1
        return 2 if self.image_guidance is None else 3

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The guided velocity, [B, 4, F, h, w] float32; all evaluations run as one batch."""
        if self.guidance == 1.0:
            return super().velocity(x_t, t, condition)
        v = self._velocities(x_t, t, condition, [condition.context, *self._other_contexts(condition)])
        return self._guided(v[0], v[1:])

    def judge(self, x_t: Tensor, t: Tensor, condition: Condition, tap: str = "middle") -> tuple[Tensor, Tensor]:
        """(x0 [B, 4, F, h, w] guided and without a graph, features [B, C, F, h', w'] with one), as cheap as `forward`.

        One conditional pass gives both: its graph ends at the tap, behind which nothing is kept for the backward pass.
        """
        output = self.unet(*self._inputs(x_t, t, condition), taps=(tap,), cut=True)
        with torch.no_grad():
            x_t = x_t.detach()
            velocity = self.schedule.to(x_t.device).as_velocity(x_t, output.sample.float(), t)
            if self.guidance != 1.0:
                others = self._velocities(x_t, t, condition, self._other_contexts(condition))
                velocity = self._guided(velocity, others)
            x0 = self.schedule.to(x_t.device).x0_from_v(x_t, velocity, t)
        return x0, output.features[tap]

    def _other_contexts(self, condition: Condition) -> list[Tensor]:
        """What guidance looks at beside the condition: no context; for three-way guidance also the image alone."""
        if self.image_guidance is None:
            return [self.null_context]
        split = self.unet.config.text_tokens
        empty_text = self.null_context[:, :split].expand(condition.context.shape[0], -1, -1)
        return [self.null_context, torch.cat([empty_text, condition.context[:, split:]], dim=1)]

    def _velocities(self, x_t: Tensor, t: Tensor, condition: Condition, contexts: list[Tensor]) -> tuple[Tensor, ...]:
        """The unguided velocity with each of the contexts, as one batch."""
        times = len(contexts)
        stacked = stack_contexts(condition, *contexts)
        return super().velocity(x_t.repeat(times, 1, 1, 1, 1), t.repeat(times), stacked).chunk(times)

    def _guided(self, conditional: Tensor, others: Sequence[Tensor]) -> Tensor:
        """``others`` as `_other_contexts` orders them."""
        if self.image_guidance is None:
            return guided_velocity(conditional, others[0], self.guidance, self.rescale)
        return guided_velocity_three_way(
            conditional, others[1], others[0], self.guidance, self.image_guidance, self.rescale
        )
