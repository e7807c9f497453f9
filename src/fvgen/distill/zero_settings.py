"""DeepSpeed's settings file, judged and completed from ours before any work starts. (No import of deepspeed here.)"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fvgen.errors import UserError
from fvgen.system.doors import Unreadable, read_json
from fvgen.system.processes import World

if TYPE_CHECKING:
    from fvgen.distill.settings import StageConfig

OURS = {  # DeepSpeed settings that follow from ours
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "gradient_clipping": "clip_norm",
    "optimizer": "student_lr, head_lr, fake_score_lr, beta1, beta2 and weight_decay",
    "scheduler": "constant learning rates",
}


def zero_settings(config: StageConfig, world: World, clip_norm: float = 1.0) -> dict[str, Any]:
    """DeepSpeed's settings: the JSON file, completed from ``config`` and a learner's ``clip_norm``.

    Raises UserError for what contradicts them.
    """
    file = config.memory.deepspeed
    try:
        settings = read_json(file)
    except Unreadable as error:
        raise UserError(f"DeepSpeed settings {file} cannot be read ({error.reason}); give a JSON file") from None
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in (1, 2, 3):
        raise UserError(f"{file}: zero_optimization.stage must be 1, 2 or 3; for one process without ZeRO leave it out")
    for key, ours in OURS.items():
        if key in settings:
            raise UserError(f"{file}: {key} follows from fvgen's own settings; remove it and set {ours}")
    zero = {key: value for key, value in zero.items() if value is not None}
    for key in ("offload_optimizer", "offload_param"):
        place = zero.get(key, {})
        if not isinstance(place, dict) or place.get("device", "none") not in ("none", "cpu"):
            raise UserError(f'{file}: {key} must read {{"device": "cpu"}}; correct it or leave it out')
    if settings.get("amp"):
        raise UserError(f"{file}: amp is not for these networks; remove it and set precision=bfloat16")
    for key in ("fp16", "bf16"):
        section = settings.get(key, {})
        enabled = section.get("enabled", False) if isinstance(section, dict) else section
        if key == "fp16" and enabled:
            raise UserError(f"{file}: fp16 overflows in these networks; remove it and set precision=bfloat16")
        if key == "bf16" and key in settings and enabled != (config.memory.precision == "bfloat16"):
            raise UserError(f"{file}: bf16 is {enabled} but precision={config.memory.precision}; remove bf16 there")
    if zero["stage"] == 3 and config.memory.share_backbone:
        raise UserError(
            f"{file}: ZeRO-3 shards each network by itself, and share_backbone=true makes them one; take ZeRO-1 or 2"
        )
    if zero["stage"] == 3 and config.method.whole:
        raise UserError(f"{file}: ZeRO-3 shards networks, and method {config.name} needs them whole; take ZeRO-1 or 2")
    if zero["stage"] < 3 and "offload_param" in zero:
        raise UserError(f"{file}: offload_param works with ZeRO-3 only; remove it or set stage to 3")
    if zero["stage"] == 1 and "offload_optimizer" in zero and config.memory.accumulation > 1:
        raise UserError(f"{file}: ZeRO-1 with offload_optimizer cannot accumulate; set stage to 2 or accumulation=1")
    narrow = config.memory.precision == "bfloat16"
    return settings | {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": clips_at_a_time(config, world.size),
        "gradient_accumulation_steps": config.memory.accumulation,
        "gradient_clipping": clip_norm,
        "bf16": {"enabled": narrow, "check_grad_overflow": narrow},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def clips_at_a_time(config: StageConfig, processes: int) -> int:
    """How many clips one process passes in one part. Raises UserError where ``batch_size`` does not divide."""
    parts = processes * config.memory.accumulation
    if config.data.batch_size % parts:
        raise UserError(
            f"batch_size={config.data.batch_size} does not divide among {processes} processes x accumulation="
            f"{config.memory.accumulation}; give a multiple of {parts}"
        )
    return config.data.batch_size // parts
