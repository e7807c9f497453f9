"""Distribution matching that is also pulled towards real clips (Data-Forcing Distillation, Chen et al. 2026).

The abstract (arXiv 2606.18478) says that one line adds "the teacher score discrepancy" between real clips and the
student's to DMD's gradient; its code is not public, the formula here is our reading of that sentence. With one noise
and one tau for both, the real score's estimate is drawn from the student's noised output to the real clip's:

    x0_real = (1 - w) teacher(x_tau of the student) + w teacher(x_tau of the real clip).

The two agree where the student's clip is a real one; a mode that the student misses keeps pulling, which reverse KL
alone, seeing nothing but the student's clips, cannot.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fvgen.distill.methods.dmd import Dmd, Rollout, View
from fvgen.distill.methods.dmd_settings import DmdSettings


class DataForcingSettings(DmdSettings):
    """`DmdSettings` and the weight of real clips."""

    data_weight: float = Field(0.5, ge=0, le=1, description="w above; 0 is distribution matching alone")

    @model_validator(mode="after")
    def _matches(self) -> DataForcingSettings:
        if not self.matching:
            raise ValueError("data-forcing changes the matching loss: dmd_weight must be above 0")
        return self


class DataForcing(Dmd):
    """`Dmd` with another real score."""

    settings: DataForcingSettings

    def real_estimate(self, rollout: Rollout, seen: View) -> Tensor:
        real_tau = self.schedule.add_noise(rollout.batch.latents, seen.noise, seen.tau)
        of_real, _ = self.teacher.judge(real_tau, seen.tau, rollout.batch.condition, ())
        return torch.lerp(seen.x0_real, of_real, self.settings.data_weight)
