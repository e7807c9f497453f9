"""Camera guidance (Wonderland, Liang et al. 2025, section 3.2): a frozen image-to-video model learns to follow a path.

    loss = | v_theta(x_t, t, image, text, cameras) - v |^2,  x_t = sqrt(ab_t) z + sqrt(1 - ab_t) e       (equation 1)

What learns is beside the base's weights and starts as nothing: the network that is trained is the base, bit for bit,
before the first update (`fvgen.models.cogvideox.camera`). No teacher stands beside it. What the stage leaves is a
teacher, which the other methods distil. The paper's rates are lost from our copy of it: docs/wonderland.md says where
each default is from.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fvgen.diffusion.samplers import ddim
from fvgen.diffusion.schedule import TIMESTEPS, trailing_timesteps
from fvgen.distill.draws import Draws
from fvgen.distill.learners import Learner
from fvgen.distill.methods.base import Deal, Method, Metrics, Setup
from fvgen.distill.settings import Data, Memory, MethodSettings, Run
from fvgen.errors import UserError
from fvgen.models.condition import CAMERA_PATH, Condition

if TYPE_CHECKING:  # the libraries behind the networks take seconds and a quarter of a gigabyte to import
    from fvgen.clips.latents import LatentBatch
    from fvgen.distill.settings import StageConfig
    from fvgen.models.denoiser import Denoiser, Teacher

NETWORK = ("branch", "control_blocks", "branch_width", "camera_lora_rank", "encoder_width", "control_t_min")
AC3D = (0.95, 0.1, 0.6, 1.0)
"""Mean, deviation and ends of t / 1000 (Bahmani et al. 2025)."""
RESOLUTION = 1 << 24  # of uniform numbers
LOOK = 20  # iterations from one look at what the camera is worth to the next


class CameraSettings(MethodSettings):
    """Blocks and rank are the paper's; rates those of AC3D on the same base; encoder width and average ours."""

    optimizer: ClassVar[Mapping[str, float]] = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 1e-4}
    whole: ClassVar[bool] = True
    result: ClassVar[str] = "teacher"

    branch: Literal["lora", "control", "dual"] = Field("dual", description="where the camera enters; dual is both")
    control_blocks: int = Field(21, ge=1, le=512, description="of the base that have a block of the branch beside them")
    copy_blocks: bool = Field(True, description="the branch's blocks start as the base's, else at random")
    branch_width: int = Field(
        0, ge=0, le=1 << 17, description="channels of the branch, which then has small blocks of its own; 0: the base's"
    )
    camera_lora_rank: int = Field(256, ge=0, le=8192, description="of the base's attention layers; 0 is none")
    encoder_width: int = Field(256, ge=1, le=1 << 17, description="channels of the camera encoders' convolutions")
    control_t_min: int = Field(
        0, ge=0, le=999, description="below this timestep the network is the base, and nothing is learnt; 600 is AC3D's"
    )
    t_distribution: Literal["uniform", "truncated_normal"] = Field(
        "uniform", description="of the timesteps that are learnt; truncated_normal is AC3D's, on 600 to 999"
    )
    ema_decay: float = Field(0.99, ge=0, lt=1, description="of the averaged weights, which are the result")
    camera_guidance: float | None = Field(
        None, ge=0, le=1000, description="of the model that is left: the camera's weight in its sampler; null keeps it"
    )
    sample_steps: int = Field(10, ge=1, le=1000, description="of DDIM, for sample clips")

    def idle(self) -> dict[str, str]:
        idle = {}
        if self.branch == "lora":
            idle |= dict.fromkeys(("control_blocks", "copy_blocks", "branch_width"), "where branch is lora")
        elif self.branch_width:
            idle["copy_blocks"] = "where branch_width is given"
        if self.branch == "control":
            idle["camera_lora_rank"] = "where branch is control"
        return idle

    @model_validator(mode="after")
    def _consistent(self) -> CameraSettings:
        low = int(TIMESTEPS * AC3D[2])
        if self.t_distribution == "truncated_normal" and self.control_t_min < low:
            raise ValueError(f"t_distribution=truncated_normal learns no timestep below {low}; set control_t_min={low}")
        return self

    def judge(self, run: Run, data: Data, memory: Memory) -> None:
        if run.init:
            raise ValueError(f"init={run.init} has no effect here; to go on, give teacher=RUN/{self.result}")
        for name in ("share_backbone", "offload_teacher"):
            if getattr(memory, name):
                raise ValueError(f"{name}=true has no effect here: what learns is part of the teacher; leave it out")

    def base_of(self, teacher: Any, seed: int) -> Any:
        torch.manual_seed(seed)  # initial weights of what is new
        copied = {} if "copy_blocks" in self.idle() else {"copy_blocks": self.copy_blocks}
        return teacher.with_cameras(**copied, **self._of_network())

    def blueprint_of(self, blueprint: Any) -> Any:
        if blueprint.with_cameras is None:
            raise UserError("this teacher cannot be guided by cameras; give one of CogVideoX")
        return blueprint.with_cameras(self._of_network())

    def student_of(self, base: Any, network: Any) -> Any:
        weight = {} if self.camera_guidance is None else {"camera_guidance": self.camera_guidance}
        return base.with_parts(**{base.network_part: network}, **weight)

    def _of_network(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in NETWORK if name not in self.idle()}


class Noised(NamedTuple):
    """Latents x_t [B, C, F, h, w] at timesteps t [B], and their velocity."""

    x_t: Tensor
    t: Tensor
    velocity: Tensor


class Camera(Method):
    """One network, the base's with what is new."""

    def __init__(self, settings: CameraSettings, teacher: Teacher, student: Learner) -> None:
        self.settings, self.teacher = settings, teacher
        self.learners, self.states = {"student": student}, {}

    @classmethod
    def build(cls, setup: Setup) -> Camera:
        from fvgen.distill.methods.networks import in_place  # takes seconds to import

        network, exact = in_place(setup, setup.teacher.network.is_guide)
        return cls(setup.config.method, setup.teacher, setup.learner("student", network, average=True, start_at=exact))

    def export(self, folder: Path, weights: Mapping[str, Mapping[str, Tensor]], base: Any, config: StageConfig) -> None:
        from fvgen.distill.methods.written import write_student

        write_student(config, base, weights["student"], folder / config.method.result)

    @property
    def student(self) -> Denoiser:
        return self.learners["student"].module

    def iterate(self, iteration: int, deal: Deal) -> list[Metrics]:
        learner, rows = self.learners["student"], []
        for batch, draws in deal():
            loss, noised = self.loss(batch, draws)
            row = {"loss_student": loss}
            if iteration % LOOK == 0 and batch.condition[CAMERA_PATH].shape[0] > 1:
                row["camera_heeded"] = self.heeded(batch, noised, loss)
            rows.append(row | {"grad_norm_student": learner.update(loss)})
        if learner.average is not None:
            learner.average.update()
        return rows

    def loss(self, batch: LatentBatch, draws: Draws) -> tuple[Tensor, Noised]:
        """Equation 1, a scalar, and what it was taken of."""
        schedule, t = self.teacher.schedule, self.timesteps(batch.latents, draws)
        noise = draws.normal(batch.latents)
        x_t, wanted = schedule.add_noise(batch.latents, noise, t), schedule.velocity(batch.latents, noise, t)
        noised = Noised(x_t, t, wanted)
        return self.error(noised, batch.condition), noised

    def error(self, noised: Noised, condition: Condition) -> Tensor:
        """The mean squared error of the velocity."""
        return (self.student.velocity(noised.x_t, noised.t, condition) - noised.velocity).square().mean()

    @torch.no_grad()
    def heeded(self, batch: LatentBatch, noised: Noised, loss: Tensor) -> Tensor:
        """How much larger the loss is where every clip has another's path, as a share of it: 0 while the camera is not
        heeded."""
        others = batch.condition[CAMERA_PATH].roll(1, 0)
        return self.error(noised, batch.condition.replaced({CAMERA_PATH: others})) / loss.detach() - 1

    def timesteps(self, like: Tensor, draws: Draws) -> Tensor:
        """[B] integers."""
        low = self.settings.control_t_min
        if self.settings.t_distribution == "uniform":
            return draws.integers(low, TIMESTEPS, like)
        uniform = (draws.integers(0, RESOLUTION, like).double() + 0.5) / RESOLUTION
        return (TIMESTEPS * truncated_normal(uniform, *AC3D)).long().clamp(low, TIMESTEPS - 1)

    @torch.no_grad()
    def sample(self, batch: LatentBatch, seed: int) -> Tensor:
        noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(seed)).to(batch.latents)
        denoiser = partial(self.teacher, condition=batch.condition)  # the very network, guided
        steps = trailing_timesteps(self.settings.sample_steps)
        return ddim(denoiser, noise, self.teacher.schedule, steps, denoise_last=True)


def truncated_normal(uniform: Tensor, mean: float, deviation: float, low: float, high: float) -> Tensor:
    """Normal numbers between ``low`` and ``high``, by the inverse of their distribution at ``uniform`` in (0, 1)."""
    a, b = (torch.special.ndtr(uniform.new_tensor((end - mean) / deviation)) for end in (low, high))
    return mean + deviation * torch.special.ndtri(a + uniform * (b - a))
