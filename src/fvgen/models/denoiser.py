"""Any family's network as a denoiser: clean latents in every caller's hands, velocities only in here.

`Denoiser` is what student, fake score and teacher have in common; `Teacher` adds guidance and is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fvgen.diffusion.guidance import emphasised, guided_velocity, guided_velocity_three_way
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.errors import UserError
from fvgen.models.condition import CAMERA_PATH, Condition, joined


class Prediction(NamedTuple):
    """``output`` [B, C, F, h, w], what the schedule says the network predicts, None where the pass stopped at its last
    tap; ``features`` [B, D, F', h', w'] by tap."""

    output: Tensor | None
    features: Mapping[str, Tensor]


class Call(Protocol):
    """How a family runs its network: joins latents and condition, takes the prediction and the tapped features out.

    ``stop``: compute nothing behind the last tap. ``cut``: the graph ends there, the prediction carries no gradient.
    """

    def __call__(
        self,
        network: nn.Module,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        taps: Sequence[str] = (),
        stop: bool = False,
        cut: bool = False,
    ) -> Prediction: ...


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Graphs made inside lead through the module but not into its parameters, which afterwards are as they were."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield module
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class Denoiser(nn.Module):
    """A network and its noise schedule: (x_t, t, condition) -> clean latents x0.

    Latents are [B, C, F, h, w] and t is [B] integers. The network runs in the type of its weights, everything around it
    in float32.
    """

    def __init__(self, network: nn.Module, schedule: NoiseSchedule, call: Call) -> None:
        super().__init__()
        self.network, self.schedule, self.call = network, schedule, call

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predicted clean latents."""
        return self.schedule.to(x_t.device).x0_from_v(x_t, self.velocity(x_t, t, condition), t)

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output as a velocity, [B, C, F, h, w] float32."""
        output = self.call(self.network, x_t, t, condition).output.float()
        return self.schedule.to(x_t.device).as_velocity(x_t, output, t)

    def features(self, x_t: Tensor, t: Tensor, condition: Condition, taps: Sequence[str]) -> tuple[Tensor, ...]:
        """Features [B, D, F', h', w'] at each of the taps; the network is not run beyond the last."""
        features = self.call(self.network, x_t, t, condition, taps, stop=True).features
        return tuple(features[tap] for tap in taps)


class Teacher(Denoiser):
    """A frozen denoiser with classifier-free guidance: no gradients of its weights, never in training mode.

    Gradients still flow through it to its inputs, as the discriminator needs. `features` are those of the conditional
    pass, without guidance.

    Args:
        network: becomes frozen, for good unless this happens inside `frozen`.
        nulls: what guidance looks at beside the condition, as the tensors (of one row, or one per clip) that take the
            place of its own: first the unconditional ones, and for three-way guidance then those that leave the image.
            Empty allows only guidance 1.
        guidance: 1 skips all passes but the conditional one, and the rescale, unless the image has another weight.
        rescale: guidance rescale, 0 for none.
        image_guidance: separate weight for the image, at the price of a third evaluation; needs both nulls.
        camera_guidance: weight of the camera path where the network looks at one. Other than 1 it costs an evaluation
            more, at the timesteps at which the network looks; text and image keep their guidance.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        call: Call,
        nulls: Sequence[Mapping[str, Tensor]] = (),
        guidance: float = 7.5,
        rescale: float = 0.7,
        image_guidance: float | None = None,
        camera_guidance: float = 1.0,
    ) -> None:
        super().__init__(network.requires_grad_(False), schedule, call)
        if image_guidance is not None and len(nulls) < 2:
            raise UserError("This teacher cannot be guided by image and text apart: leave image_guidance out.")
        self.guidance, self.rescale, self.image_guidance = guidance, rescale, image_guidance
        self.camera_guidance = camera_guidance
        if self._others and not nulls:
            raise UserError(f"The teacher has guidance {guidance} but no null context: give one, or set guidance to 1.")
        self._null_names = [list(null) for null in nulls]
        for index, null in enumerate(nulls):
            for name, tensor in null.items():
                self.register_buffer(f"null{index}_{name}", tensor, persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    @property
    def nfe(self) -> int:
        """Network evaluations per call and clip, at timesteps at which a camera is looked at."""
        return 1 + self._others + (self.camera_guidance != 1.0)

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The guided velocity, [B, C, F, h, w] float32; all evaluations run as one batch, but for that without camera,
        which is cheaper."""
        if self._others:
            conditional, *others = self._velocities(x_t, t, [condition, *self._without(condition)])
            guided = self._guided(conditional, others)
        else:
            guided = conditional = super().velocity(x_t, t, condition)
        return self._steered(guided, conditional, x_t, t, condition)

    def judge(
        self, x_t: Tensor, t: Tensor, condition: Condition, taps: Sequence[str]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(x0 [B, C, F, h, w] guided and without a graph, features at the taps with one), as cheap as `forward`.

        One conditional pass gives both: its graph ends at the last tap, behind which nothing is kept for the backward
        pass. Without taps there is no graph at all.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(taps)):
            output, features = self.call(self.network, x_t, t, condition, taps, cut=True)
        with torch.no_grad():
            x_t = x_t.detach()
            velocity = conditional = self.schedule.to(x_t.device).as_velocity(x_t, output.float(), t)
            if self._others:
                velocity = self._guided(conditional, self._velocities(x_t, t, self._without(condition)))
            velocity = self._steered(velocity, conditional, x_t, t, condition)
            x0 = self.schedule.to(x_t.device).x0_from_v(x_t, velocity, t)
        return x0, tuple(features[tap] for tap in taps)

    @property
    def _others(self) -> int:
        """How many passes guidance takes beside the conditional one."""
        if self.guidance == 1.0 and self.image_guidance in (None, 1.0):
            return 0
        return 1 if self.image_guidance is None else 2

    def _without(self, condition: Condition) -> list[Condition]:
        nulls = [
            {name: getattr(self, f"null{index}_{name}") for name in names}
            for index, names in enumerate(self._null_names[: self._others])
        ]
        return [condition.replaced(null) for null in nulls]

    def _velocities(self, x_t: Tensor, t: Tensor, conditions: Sequence[Condition]) -> tuple[Tensor, ...]:
        """The unguided velocity under each of the conditions, as one batch."""
        times = len(conditions)
        condition = joined([condition.expanded(len(x_t)) for condition in conditions])
        return super().velocity(x_t.repeat(times, 1, 1, 1, 1), t.repeat(times), condition).chunk(times)

    def _guided(self, conditional: Tensor, others: Sequence[Tensor]) -> Tensor:
        """``others`` as `_without` orders them."""
        if self.image_guidance is None:
            return guided_velocity(conditional, others[0], self.guidance, self.rescale)
        return guided_velocity_three_way(
            conditional, others[1], others[0], self.guidance, self.image_guidance, self.rescale
        )

    def _steered(self, guided: Tensor, conditional: Tensor, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """``guided`` [B, C, F, h, w] with the camera's own weight."""
        if self.camera_guidance == 1.0:
            return guided
        if self.nobody_looks(t):
            return guided
        blind = super().velocity(x_t, t, condition.without(CAMERA_PATH))
        return emphasised(guided, conditional, blind, self.camera_guidance)

    def nobody_looks(self, t: Tensor) -> bool:
        """Whether the network sees no camera at any of the timesteps [B], so that there is nothing to weigh. Processes
        make the same passes, whatever their t: ZeRO-3 gathers weights in each."""
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        return not together and not bool((t >= self.network.cameras_from).any())
