"""The networks of a method, made from the teacher or an earlier stage: whole copies, or roles of one shared network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fvgen.distill.methods.base import Method, Setup
from fvgen.distill.methods.written import ADAPTER
from fvgen.distill.settings import Memory
from fvgen.errors import UserError, first_line
from fvgen.models.critic import Critic
from fvgen.models.denoiser import Denoiser
from fvgen.models.head import head_for
from fvgen.models.lora import Role, SharedBackbone, in_role
from fvgen.objectives import divergences
from fvgen.objectives.gan import KINDS
from fvgen.objectives.ratio import RatioConstant, RatioNormalizer
from fvgen.pipelines.folders import load_head, load_pipeline
from fvgen.pipelines.student import StudentPipeline
from fvgen.system.doors import load_tensors, not_finite


def build_dmd(kind: Callable[..., Method], setup: Setup, head_on: str = "teacher") -> Method:
    """Student, head and fake score around a teacher; the student starts as the teacher or as the earlier stage's, the
    head sees the features of ``head_on``.

    All networks stay in evaluation mode: the teacher's dropout would add noise to every target.
    """
    config, settings = setup.config, setup.config.method
    torch.manual_seed(config.run.seed)  # initial weights of head and adapters
    critic = make_critic(setup) if settings.judging else None
    networks, exact = denoisers(setup, ["student", *["fake_score"] * settings.matching])
    if critic is not None and head_on != "teacher":
        critic = replace(critic, source=networks[head_on])
    normalizer = None
    if settings.matching and critic is not None:
        at_equality = divergences.weight(settings.divergence, torch.zeros(1)).item()
        normalizer = RatioNormalizer(at_equality, settings.ratio_bins, settings.ratio_decay).to(setup.device)
    constant = None
    if settings.weighing and KINDS[settings.gan_kind].paired:
        constant = RatioConstant(settings.ratio_bins, settings.ratio_decay).to(setup.device)
    return kind(
        settings,
        setup.teacher,
        setup.learner("student", networks["student"], average=True, start_at=exact.get("student")),
        critic,
        None if critic is None else setup.learner("head", critic.head),
        setup.learner("fake_score", networks["fake_score"], start_at=exact.get("fake_score"))
        if settings.matching
        else None,
        normalizer,
        setup.world,
        constant,
    )


def make_critic(setup: Setup) -> Critic:
    """A head on the teacher's taps, fresh or the earlier stage's. Raises UserError where that one does not fit."""
    network, settings = setup.teacher.network, setup.config.method
    taps = tuple(settings.taps.split(",")) if settings.taps else (setup.family.default_tap(network),)
    head = head_for(setup.family.widths(network, taps), settings.head_channels)
    if setup.start_from is not None and (setup.start_from / "head").is_dir():
        expected, head = head.config, load_head(setup.start_from / "head")
        for key in ("in_channels", "channels"):
            if head.config[key] != expected[key]:
                raise UserError(
                    f"the head in init={setup.start_from} has {key}={head.config[key]}, this stage needs "
                    f"{expected[key]}; set teacher, taps and head_channels as they were there"
                )
    return Critic(setup.teacher, taps, _ready(head.to(setup.device)))


def denoisers(
    setup: Setup, names: Sequence[str], trains: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, Denoiser], dict[str, dict[str, Tensor]]]:
    """The student and others (which start as the teacher), by name: whole networks, or adapters where `Memory` says so;
    and, of those that are narrower, the float32 weights that they were rounded from, by network and name.

    ``trains``: whether a weight of this name learns; one that does not is the teacher's very tensor, and layers without
    any get no adapter. The teacher's own network takes the memory settings' type and checkpointing too.
    """
    memory: Memory = setup.config.memory
    teacher, start = setup.teacher.network, setup.start_from
    adapted = {name: memory.student_lora if name == "student" else memory.share_backbone for name in names}
    if not any(trains(name) for name, _ in teacher.named_parameters()):
        raise UserError(
            f"the teacher's network has no weight that the settings let learn; its names are like "
            f"{', '.join(name for name, _ in list(teacher.named_parameters())[:2])}"
        )
    whole: dict[str, nn.Module] = {}
    goes_on = {"student"}
    if getattr(setup.config.method, "fake_score_start", "") == "student":
        goes_on.add("fake_score")
    for name in [name for name in names if not adapted[name]]:
        if name in goes_on and start is not None:
            whole[name] = load_pipeline(start / "student", StudentPipeline).network.to(setup.device)
        else:
            whole[name] = _copied(teacher, trains)
    # Master weights start where the teacher or the earlier stage ended, not at the next bfloat16, which is further than
    # an update.
    exact: dict[str, dict[str, Tensor]] = {}
    if memory.precision == "bfloat16" and whole and setup.device.type != "meta":  # where weights have no values
        of_teacher = _weights(teacher, trains)  # one copy for all
        exact = {n: _weights(w, trains) if n in goes_on and start is not None else of_teacher for n, w in whole.items()}
    for network in (teacher, *whole.values()):
        _prepare(network, memory)
    calls = dict.fromkeys(names, setup.teacher.call)
    roles = [name for name in names if adapted[name]]
    if roles:
        backbone = SharedBackbone(
            teacher, roles, memory.lora_rank, _targets(teacher, setup.family.lora_targets, trains)
        )
        if memory.checkpoint_activations:
            teacher.enable_gradient_checkpointing(backbone.checkpointed)
        whole |= {name: Role(backbone, name) for name in roles}
        calls |= dict.fromkeys(roles, in_role(setup.teacher.call))
    if adapted.get("student") and start is not None:
        exact["student"] = _load_adapter(whole["student"], start)
    schedule = setup.teacher.schedule
    ready = {name: _ready(Denoiser(whole[name], schedule, calls[name])) for name in names}
    for network in (whole[name] for name in names if not adapted[name]):
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(trains(name))
    return ready, exact


def in_place(setup: Setup, trains: Callable[[str], bool]) -> tuple[Denoiser, dict[str, Tensor]]:
    """The teacher's very network as the student, of which the weights whose names ``trains`` takes learn: a method that
    has no use for the teacher beside it keeps none. And the float32 weights that these were rounded from, if any."""
    memory, network = setup.config.memory, setup.teacher.network
    rounded = memory.precision == "bfloat16" and setup.device.type != "meta"
    exact = _weights(network, trains) if rounded else {}
    _prepare(network, memory)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(trains(name))
    return Denoiser(network.eval(), setup.teacher.schedule, setup.teacher.call), exact


def _copied(network: nn.Module, trains: Callable[[str], bool]) -> nn.Module:
    """A copy whose weights that do not learn are the network's own tensors."""
    kept = {id(parameter): parameter for name, parameter in network.named_parameters() if not trains(name)}
    return copy.deepcopy(network, kept)


def _targets(network: nn.Module, ends: Sequence[str], trains: Callable[[str], bool]) -> Sequence[str]:
    """The layers that get an adapter: ends of names, or whole names where not all of them learn."""
    layers = [name for name, _ in network.named_modules() if f".{name}".endswith(tuple(f".{end}" for end in ends))]
    chosen = [name for name in layers if trains(f"{name}.weight")]
    if not chosen:
        raise UserError("student_lora=true: none of the layers that get an adapter may learn; change trained=...")
    return ends if len(chosen) == len(layers) else chosen


def _weights(network: nn.Module, trains: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """As they are now, on the CPU, by the names that they have in a `Denoiser`."""
    named = ((name, parameter) for name, parameter in network.named_parameters() if trains(name))
    return {f"network.{name}": parameter.detach().cpu() for name, parameter in named}


def _prepare(network: nn.Module, memory: Memory) -> None:
    if memory.checkpoint_activations:
        network.enable_gradient_checkpointing()
    if memory.precision == "bfloat16" and any(p.dtype != torch.bfloat16 for p in network.parameters()):
        nn.Module.to(network, torch.bfloat16)  # diffusers' own warns of a list that is empty


def _ready(network: nn.Module) -> nn.Module:
    return network.requires_grad_(True).eval()


def _load_adapter(role: Role, start_from: Path) -> dict[str, Tensor]:
    """Go on with the student adapter of an earlier stage; returns its float32 weights."""
    file = start_from / ADAPTER
    if not file.is_file():
        raise UserError(
            f"init={start_from} has no {ADAPTER}: its student was trained whole; train it with student_lora=true, or "
            "leave student_lora out here"
        )
    try:
        weights = load_tensors(file)
        if (wrong := not_finite(weights.items())) is not None:
            raise ValueError(f"{wrong} holds NaN or an infinity")
        with torch.no_grad():
            for name, parameter in role.named_parameters():
                parameter.copy_(weights[f"network.{name}"])
        return weights
    except (UserError, ValueError, KeyError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"{file} is damaged or of another lora_rank ({reason}); train that stage again") from error
