"""Settings of a distillation: typed, documented, judged before any work starts."""

from __future__ import annotations

import reprlib
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fvgen.errors import UserError, did_you_mean, first_line
from fvgen.objectives.divergences import DIVERGENCES
from fvgen.objectives.gan import KINDS

Stage = Literal["gan", "dmd"]
SECTIONS = ("gan", "dmd")
NO_YAML = (yaml.YAMLError, ValueError, RecursionError)  # ValueError: other than UTF-8, or a date that does not exist


class StageConfig(BaseModel):
    """One stage: "gan" (FVGen section 4.1) or "dmd" (section 4.2, in which the adversarial update goes on)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    stage: Stage
    out: str = Field(min_length=1, description="folder of this run; the same command again resumes it")
    teacher: str = Field("tiny", description="a ViewCrafterPipeline folder, or the name of a shipped preset")
    data: str = Field("builtin", description="'builtin' scenes, a folder of clips, or shards (a folder, s3://, ...)")
    clips: int = Field(64, ge=1, description="how many built-in clips to train on; ignored for a folder")
    init: str = Field(
        "", description="folder of an earlier stage whose student and head to start from; '' for the teacher"
    )
    seed: int = Field(0, ge=0, le=2**32 - 1)
    device: str = Field("cpu", description="where to train, as torch names it: cpu, cuda, cuda:1")

    iterations: int = Field(200, ge=1)
    batch_size: int = Field(4, ge=1)
    student_steps: Literal[1, 2, 4, 8] = Field(4, description="NFE of the student")
    student_input: Literal["noised", "simulated"] = Field(
        "noised",
        description="what the student denoises: noised real clips (FVGen algorithm 1) or its own earlier steps (DMD2)",
    )
    critic_updates: int = Field(
        2, ge=1, description="updates of head and fake score per student update (two-time-scale rule)"
    )
    head_warmup: int = Field(0, ge=0, description="first iterations in which only the critics learn")

    student_lr: float = Field(5e-5, gt=0)
    fake_score_lr: float = Field(5e-5, gt=0)
    head_lr: float = Field(5e-5, gt=0)
    beta1: float = Field(0.0, ge=0, lt=1, description="AdamW's first moment; 0 is usual where critics move")
    beta2: float = Field(0.999, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0, description="largest gradient norm of each network")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="of the student's averaged weights, which are the result")

    gan_weight: float = Field(1.0, ge=0, description="of the adversarial loss in the student's loss")
    gan_kind: str = Field("non_saturating", description=f"one of {', '.join(KINDS)}")
    r1_weight: float = Field(0.0, ge=0, description="of the approximate gradient penalty on real clips; 0 is off")
    r1_sigma: float = Field(0.05, gt=0, description="its perturbation, in units of the noised latents")
    regression_weight: float = Field(
        0.0, ge=0, description="of the mean squared error to the true latents (noised input only); the paper has none"
    )
    head_channels: int = Field(64, ge=8, multiple_of=8)
    t_min: int = Field(20, ge=0, le=999, description="lowest timestep at which samples are noised for the critics")
    t_max: int = Field(979, ge=0, le=999, description="highest one")

    dmd_weight: float = Field(1.0, ge=0, description="of the distribution-matching loss in the student's loss")
    divergence: str = Field("softened_reverse_kl", description=f"one of {', '.join(DIVERGENCES)}")
    guidance: float | None = Field(None, ge=0, description="on the real score; null takes the teacher's own")
    ratio_bins: int = Field(10, ge=1, le=1000, description="bins of timesteps with a running mean of the weight each")
    ratio_decay: float = Field(0.99, gt=0, lt=1, description="of those running means")

    same_noise: bool = Field(
        False,
        description="judge the student at the tau and noise at which the head has just learnt (FVGen algorithm 1 as "
        "printed): one teacher pass to the tap fewer",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of weights and activations; with bfloat16 the optimisers keep float32 master weights"
    )
    accumulation: int = Field(1, ge=1, description="parts in which each process passes its clips, to save memory")
    checkpoint_activations: bool = Field(False, description="compute activations again instead of keeping them")
    fused: bool | None = Field(None, description="AdamW in one kernel; null means on a GPU (last bits differ)")
    share_backbone: bool = Field(
        False, description="the fake score is a LoRA adapter on the one frozen teacher instead of a network of its own"
    )
    student_lora: bool = Field(False, description="so is the student; needs share_backbone")
    lora_rank: int = Field(16, ge=1)
    deepspeed: str = Field("", description="JSON file of DeepSpeed settings; '' trains in one plain process")
    offload_teacher: bool = Field(False, description="keep the frozen teacher in the CPU's memory; needs deepspeed")

    checkpoint_every: int = Field(50, ge=1, description="iterations between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="how many of the newest to keep")
    keep_best_by: str = Field(
        "", description="also keep the checkpoint before which this metric's mean was lowest, e.g. loss_student"
    )
    max_skips: int = Field(3, ge=1, description="iterations in a row with a loss or gradient that is not finite")
    sample_every: int = Field(
        100, ge=0, description="iterations between sample clips of the student and their spread; 0 is never"
    )
    track: bool = Field(True, description="curves for TensorBoard and Weights & Biases where those are installed")

    @model_validator(mode="after")
    def _consistent(self) -> StageConfig:
        for field, table in (("divergence", DIVERGENCES), ("gan_kind", KINDS)):
            value = getattr(self, field)
            if value not in table:
                raise ValueError(f"{field}={value!r} is unknown{did_you_mean(value, table)}")
        if self.t_min > self.t_max:
            raise ValueError(f"t_min={self.t_min} lies above t_max={self.t_max}; swap them")
        if self.regression_weight > 0 and self.student_input == "simulated":
            raise ValueError("regression_weight needs student_input=noised: a simulated clip has no true latents")
        weights = ["gan_weight", "regression_weight"] + ["dmd_weight"] * (self.stage == "dmd")
        if not any(getattr(self, weight) for weight in weights):
            raise ValueError(
                f"{', '.join(weights)} are all 0, so stage {self.stage} has nothing to learn from; raise one"
            )
        if self.student_lora and not self.share_backbone:
            raise ValueError("student_lora=true needs share_backbone=true: the adapter sits on the shared teacher")
        if self.same_noise and self.accumulation > 1:
            raise ValueError("same_noise=true needs accumulation=1: it keeps the graph of the whole batch")
        if self.offload_teacher and not self.deepspeed:
            raise ValueError("offload_teacher=true needs deepspeed=FILE: DeepSpeed moves the weights to and fro")
        if self.head_warmup >= self.iterations:
            raise ValueError(
                f"head_warmup={self.head_warmup} leaves the student none of {self.iterations} iterations; lower it"
            )
        return self


RESUMABLE = {
    *("iterations", "out", "deepspeed", "accumulation", "offload_teacher", "checkpoint_activations"),
    *("checkpoint_every", "keep_checkpoints", "keep_best_by", "max_skips", "sample_every", "track"),
}
"""Settings that may change when a run is resumed: none of them changes what an update means."""


class RunConfig(BaseModel):
    """Both stages, one after the other: ``out/stage1_gan``, then ``out/stage2_dmd`` starting from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gan: StageConfig
    dmd: StageConfig


def stage_config(
    stage: Stage, settings: dict[str, Any], where: str = "settings", overrides: Container[str] = ()
) -> StageConfig:
    """A judged `StageConfig`. Raises UserError that names the first wrong setting, where it stands and the cure.

    ``where`` the settings stand, except for those in ``overrides``, which come from the command line.
    """

    def place(key: Any) -> str:
        return "command line" if key in overrides else where

    known = StageConfig.model_fields
    for key in settings:
        if key not in known:
            near = {*known, *SECTIONS} - {key, "stage"}
            raise UserError(f"{place(key)}: unknown setting {key!r}{did_you_mean(str(key), near)}")
    if settings.get("stage", stage) != stage:
        raise UserError(
            f"{place('stage')}: stage={settings['stage']!r}, but this is stage {stage!r}; remove the setting"
        )
    try:
        return StageConfig(**{**settings, "stage": stage})
    except ValidationError as error:
        first = error.errors()[0]
        key = first["loc"][0] if first["loc"] else None
        if first["type"] == "missing":
            raise UserError(f"{where}: {key} is not given; add {key}=...") from None
        problem = first["msg"].removeprefix("Value error, ")
        value = "" if key is None else f"{key}={reprlib.repr(first['input'])}: "
        raise UserError(f"{place(key)}: {value}{problem[0].lower() + problem[1:]}") from None


def run_config(settings: dict[str, Any], out: str | Path, where: str = "settings") -> RunConfig:
    """Both stages from one mapping: common settings on top, departures of a stage under ``gan`` and ``dmd``."""
    first = Path(out) / "stage1_gan"
    gan = stage_config("gan", {**_section(settings, "gan", where), "out": str(first)}, where)
    dmd_settings = {**_section(settings, "dmd", where), "out": str(Path(out) / "stage2_dmd"), "init": str(first)}
    return RunConfig(gan=gan, dmd=stage_config("dmd", dmd_settings, where))


def read_stage_config(stage: Stage, file: str | Path, overrides: Sequence[str]) -> StageConfig:
    """A recipe's settings: the YAML ``file``, its section for ``stage``, then ``key=value`` words; the last wins."""
    settings = _section(read_yaml(file), stage, str(file))
    words = parse_overrides(overrides)
    return stage_config(stage, {**settings, **words}, str(file), words)


def read_yaml(file: str | Path) -> dict[str, Any]:
    """A YAML mapping; raises UserError for a file that is missing or something else."""
    try:
        settings = yaml.safe_load(Path(file).read_text())
    except (OSError, *NO_YAML) as error:
        reason = first_line(error)
        raise UserError(f"config file {file} cannot be read ({reason}); give a YAML file of settings") from None
    if not isinstance(settings, dict):
        raise UserError(f"config file {file} holds no 'key: value' lines; give a YAML file of settings")
    return settings


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """``["head_lr=1e-4", "out=runs/a"]`` to a mapping. Values are read as YAML, except that names stay names (a folder
    may be called 2024) and 1e-4 is a number."""
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} is no setting; write key=value, for example iterations=200")
        settings[key] = _value(key, value)
    return settings


def _value(key: str, text: str) -> Any:
    if _is_name(key):
        return text
    try:
        return _number(key, yaml.safe_load(text))
    except NO_YAML:
        word = reprlib.repr(f"{key}={text}")
        raise UserError(f"the value in {word} cannot be read; quote it or write a plain number or word") from None


def _section(settings: dict[str, Any], stage: Stage, where: str) -> dict[str, Any]:
    common = {key: value for key, value in settings.items() if key not in SECTIONS}
    section = settings.get(stage)
    if section is None:
        section = {}
    if not isinstance(section, dict):
        raise UserError(f"{where}: section {stage!r} holds no 'key: value' lines; indent its settings below it")
    return {key: _number(key, value) for key, value in {**common, **section}.items()}


def _is_name(key: str) -> bool:
    field = StageConfig.model_fields.get(key)
    return field is not None and field.annotation is str


def _number(key: str, value: Any) -> Any:
    """YAML 1.1 takes 1e-4 for a word."""
    try:
        return float(value) if isinstance(value, str) and not _is_name(key) else value
    except ValueError:
        return value
