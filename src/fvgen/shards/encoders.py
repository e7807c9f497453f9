"""The part of a teacher that makes shards: its encoders, without the network that takes most of the memory."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from fvgen.models.viewcrafter.pipelines import FVGenPipeline, ViewCrafterPipeline
from fvgen.models.viewcrafter.unet import ViewCrafterUNet
from fvgen.pipelines.folders import DAMAGE, damaged, load_pipeline, model_folder, model_kind

Encoding = ViewCrafterPipeline | FVGenPipeline  # a student has its teacher's encoders


def load_encoders(name: str | Path) -> Encoding:
    """A teacher or student whose network has settings and shapes (it is on torch's device "meta") but no weights.

    Raises UserError for a folder that is none or damaged.
    """
    folder = model_folder(name)
    kind = FVGenPipeline if model_kind(folder) == "FVGenPipeline" else ViewCrafterPipeline
    try:
        with torch.device("meta"):
            unet = ViewCrafterUNet.from_config(ViewCrafterUNet.load_config(folder / "unet", local_files_only=True))
    except DAMAGE as error:
        raise damaged(folder, error) from error
    return load_pipeline(folder, kind, unet=unet)


def placed(pipeline: Encoding, device: str) -> Encoding:
    """The same on a device, now without any network."""
    pipeline.register_modules(unet=None)
    return pipeline.to(device)


@cache
def encoders(name: str, device: str) -> Encoding:
    """Those of a worker, for all of its shards."""
    return placed(load_encoders(name), device)
