"""Who takes part in a stage: networks made from the teacher or an earlier stage, an engine for each that learns."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import torch
from torch import nn

from fvgen.distill.config import StageConfig
from fvgen.distill.ema import EMA
from fvgen.distill.engines import make_engine, shard_frozen
from fvgen.distill.steps import Players
from fvgen.distributed import ALONE, World
from fvgen.errors import UserError
from fvgen.models.discriminator import DiscriminatorHead
from fvgen.models.teacher import Denoiser
from fvgen.objectives import divergences
from fvgen.objectives.ratio import RatioNormalizer
from fvgen.pipeline import FVGenPipeline, ViewCrafterPipeline
from fvgen.presets import load_head, load_pipeline


def build_players(
    config: StageConfig, base: ViewCrafterPipeline, start_from: Path | None, world: World = ALONE
) -> tuple[Players, EMA]:
    """Student, teacher, head and (stage "dmd") fake score; the student starts as the teacher or as ``start_from``'s.

    All networks stay in evaluation mode: the teacher's dropout would add noise to every target.
    """
    schedule = base.schedule
    teacher = base.teacher(config.guidance)
    torch.manual_seed(config.seed)  # the head's initial weights
    width = teacher.unet.config.model_channels * teacher.unet.config.channel_mult[-1]
    head = DiscriminatorHead(width, config.head_channels)
    student_unet: nn.Module = copy.deepcopy(teacher.unet)
    if start_from is not None:
        student_unet = load_pipeline(start_from / "student", FVGenPipeline).unet
        expected, head = head.config, load_head(start_from / "head")
        for key in ("in_channels", "channels"):
            if head.config[key] != expected[key]:
                raise UserError(
                    f"the head in init={start_from} has {key}={head.config[key]}, this stage needs {expected[key]}; "
                    "set teacher and head_channels as they were there"
                )
    matching = config.stage == "dmd"
    student = Denoiser(student_unet, schedule)
    fake_score = Denoiser(copy.deepcopy(teacher.unet), schedule) if matching else None
    student, fake_score, head = (
        None if network is None else network.requires_grad_(True).eval().to(config.device)
        for network in (student, fake_score, head)
    )
    unets = [denoiser.unet for denoiser in (teacher, student, fake_score) if denoiser is not None]
    for unet in unets:
        if config.checkpoint_activations:
            unet.enable_gradient_checkpointing()
        if config.precision == "bfloat16":
            unet.to(torch.bfloat16)

    at_equality = divergences.weight(config.divergence, torch.zeros(1)).item()
    normalizer = RatioNormalizer(at_equality, config.ratio_bins, config.ratio_decay).to(config.device)
    players = Players(
        teacher=teacher,
        student=student,
        head=head,
        fake_score=fake_score,
        normalizer=normalizer if matching else None,
        student_engine=make_engine(student, config.student_lr, config, world),
        head_engine=make_engine(head, config.head_lr, config, world),
        fake_score_engine=make_engine(fake_score, config.fake_score_lr, config, world) if matching else None,
        world=world,
    )
    ema = EMA(players.student_engine, config.ema_decay)
    shard_frozen(teacher, config, world)
    return players, ema


def fingerprint(players: Players) -> str:
    """Twelve hex digits that change with any name or shape of a learning network: whose checkpoint is it?"""
    digest = hashlib.sha256()
    for name in ("student", "head", "fake_score"):
        engine = getattr(players, f"{name}_engine")
        for key, shape in [] if engine is None else sorted(engine.shapes.items()):
            digest.update(f"{name} {key} {tuple(shape)};".encode())
    return digest.hexdigest()[:12]
