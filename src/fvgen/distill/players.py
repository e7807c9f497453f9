"""Who takes part in a stage: networks made from the teacher or an earlier stage, an engine for each that learns."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fvgen.distill.config import StageConfig
from fvgen.distill.ema import EMA
from fvgen.distill.engines import Engine, make_engine, shard_frozen
from fvgen.distill.steps import Players
from fvgen.errors import UserError, first_line
from fvgen.models.critic import DiscriminatorHead
from fvgen.models.denoiser import Denoiser, Teacher
from fvgen.models.lora import RoleUNet, SharedBackbone
from fvgen.models.viewcrafter.pipelines import FVGenPipeline, ViewCrafterPipeline
from fvgen.objectives import divergences
from fvgen.objectives.ratio import RatioNormalizer
from fvgen.pipelines.folders import load_head, load_pipeline
from fvgen.system.processes import ALONE, World

ADAPTER = "student_lora.safetensors"
"""In a stage's folder: the averaged adapter of a student that is one."""


def build_players(
    config: StageConfig, base: ViewCrafterPipeline, start_from: Path | None, world: World = ALONE
) -> tuple[Players, EMA]:
    """Student, teacher, head and (stage "dmd") fake score; the student starts as the teacher or as ``start_from``'s.

    All networks stay in evaluation mode: the teacher's dropout would add noise to every target.
    """
    teacher = base.teacher(config.guidance)
    torch.manual_seed(config.seed)  # the head's initial weights
    width = teacher.unet.config.model_channels * teacher.unet.config.channel_mult[-1]
    head = DiscriminatorHead(width, config.head_channels)
    if start_from is not None:
        expected, head = head.config, load_head(start_from / "head")
        for key in ("in_channels", "channels"):
            if head.config[key] != expected[key]:
                raise UserError(
                    f"the head in init={start_from} has {key}={head.config[key]}, this stage needs {expected[key]}; "
                    "set teacher and head_channels as they were there"
                )
    engine = partial(make_engine, config=config, world=world)
    at_equality = divergences.weight(config.divergence, torch.zeros(1)).item()
    players = assemble(config, teacher, head.to(config.device), start_from, engine, world, at_equality)
    ema = EMA(players.student_engine, config.ema_decay)
    shard_frozen(teacher, config, world)
    return players, ema


def assemble(
    config: StageConfig,
    teacher: Teacher,
    head: DiscriminatorHead,
    start_from: Path | None,
    engine: Callable[[nn.Module, float], Engine],
    world: World = ALONE,
    at_equality: float = 1.0,
) -> Players:
    """The players around a teacher and a head, each learning one with its ``engine(module, lr)``. ``at_equality`` is
    the divergence's weight where student and teacher agree."""
    schedule, matching = teacher.schedule, config.stage == "dmd"
    student_unet: nn.Module | None = None
    if not config.student_lora and start_from is None:
        student_unet = copy.deepcopy(teacher.unet)
    elif not config.student_lora:
        student_unet = load_pipeline(start_from / "student", FVGenPipeline).unet.to(config.device)
    fake_unet = copy.deepcopy(teacher.unet) if matching and not config.share_backbone else None
    # Master weights go on where the earlier stage's ended, not at the next bfloat16, which is further than an update.
    exact = {}
    if student_unet is not None and start_from is not None and config.precision == "bfloat16":
        exact = {f"unet.{name}": p.detach().cpu() for name, p in student_unet.named_parameters()}
    for unet in (teacher.unet, student_unet, fake_unet):
        if unet is not None and config.checkpoint_activations:
            unet.enable_gradient_checkpointing()
        if unet is not None and config.precision == "bfloat16" != str(unet.dtype).removeprefix("torch."):
            nn.Module.to(unet, torch.bfloat16)  # diffusers' own warns of a list that is empty
    roles = ["student"] * (student_unet is None) + ["fake_score"] * (matching and fake_unet is None)
    if roles:
        backbone = SharedBackbone(teacher.unet, roles, config.lora_rank)
        if config.checkpoint_activations:
            teacher.unet.enable_gradient_checkpointing(backbone.checkpointed)
        student_unet = RoleUNet(backbone, "student") if student_unet is None else student_unet
        if matching:
            fake_unet = RoleUNet(backbone, "fake_score") if fake_unet is None else fake_unet
    if config.student_lora and start_from is not None:
        _load_adapter(student_unet, start_from)

    def ready(network: nn.Module) -> nn.Module:
        return network.requires_grad_(True).eval()

    student, head = ready(Denoiser(student_unet, schedule)), ready(head)
    fake_score = ready(Denoiser(fake_unet, schedule)) if matching else None
    student_engine = engine(student, config.student_lr)
    if exact:
        student_engine.start_at(exact)
    normalizer = RatioNormalizer(at_equality, config.ratio_bins, config.ratio_decay).to(config.device)
    return Players(
        teacher=teacher,
        student=student,
        head=head,
        fake_score=fake_score,
        normalizer=normalizer if matching else None,
        student_engine=student_engine,
        head_engine=engine(head, config.head_lr),
        fake_score_engine=engine(fake_score, config.fake_score_lr) if matching else None,
        world=world,
    )


def _load_adapter(unet: RoleUNet, start_from: Path) -> None:
    """Go on with the student adapter of an earlier stage."""
    file = start_from / ADAPTER
    if not file.is_file():
        raise UserError(
            f"init={start_from} has no {ADAPTER}: its student was trained whole; train it with student_lora=true, or "
            "leave student_lora out here"
        )
    try:
        weights = load_file(file)
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                parameter.copy_(weights[f"unet.{name}"])
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"{file} is damaged or of another lora_rank ({reason}); train that stage again") from error


def fingerprint(players: Players) -> str:
    """Twelve hex digits that change with any name or shape of a learning network: whose checkpoint is it?"""
    digest = hashlib.sha256()
    for name in ("student", "head", "fake_score"):
        engine = getattr(players, f"{name}_engine")
        for key, shape in [] if engine is None else sorted(engine.shapes.items()):
            digest.update(f"{name} {key} {tuple(shape)};".encode())
    return digest.hexdigest()[:12]
