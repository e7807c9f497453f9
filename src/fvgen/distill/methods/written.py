"""What a stage leaves on disk: the student as a pipeline folder, its adapter, the head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fvgen.distill.settings import StageConfig
from fvgen.models.head import DiscriminatorHead
from fvgen.models.lora import merged_weights
from fvgen.pipelines.folders import load_pipeline, save_model
from fvgen.pipelines.student import StudentPipeline
from fvgen.pipelines.teacher import TeacherPipeline
from fvgen.system.files import write_tensors

ADAPTER = "student_lora.safetensors"
"""In a stage's folder: the averaged adapter of a student that is one."""


def write_student(config: StageConfig, base: TeacherPipeline, weights: Mapping[str, Tensor], folder: Path) -> None:
    """``weights`` are the student's as `EMA.weights` names them: a whole network's, the part of it that learns, or an
    adapter's on ``base``'s, which is merged. Raises UserError when the disk is full."""
    network = type(base.network).from_config(base.network.config).eval()
    if config.memory.student_lora:
        network.load_state_dict(merged_weights(base.network, weights))
    else:
        learnt = {name.removeprefix("network."): tensor for name, tensor in weights.items()}
        network.load_state_dict(learnt | _rest(config, base, network, learnt))
    save_model(config.method.student_of(base, network), folder)


def _rest(
    config: StageConfig, base: TeacherPipeline, network: nn.Module, learnt: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What ``learnt`` has not of the student's ``network``: buffers, as a table of learned positions, and weights that
    stayed as the student started, as they were before the teacher was rounded to train."""
    started = base.network
    if any(name not in learnt for name, _ in network.named_parameters()):
        if config.run.init:
            started = load_pipeline(Path(config.run.init) / "student", StudentPipeline).network
        elif config.memory.precision != "float32":
            started = load_pipeline(config.run.teacher, TeacherPipeline).network
    state = started.state_dict()
    return {name: state[name].detach().cpu() for name in network.state_dict().keys() - learnt.keys()}


def write_adapter(weights: Mapping[str, Tensor], folder: Path) -> None:
    """The student's averaged adapter, for a stage that goes on with it."""
    write_tensors(folder / ADAPTER, weights)


def write_head(head: DiscriminatorHead, weights: Mapping[str, Tensor], folder: Path) -> None:
    """A discriminator head's folder, in float32."""
    settings = {key: head.config[key] for key in ("in_channels", "channels", "norm_num_groups")}
    copy = DiscriminatorHead(**settings).eval()
    copy.load_state_dict(dict(weights))
    save_model(copy, folder)
