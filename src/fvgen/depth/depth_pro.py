"""Depth Pro (Bochkovskii et al. 2024) through transformers: one photograph each, brought to the scale of the poses.

Weights: the folder that FVGEN_DEPTH_PRO names, else `REPOSITORY` in the Hub's cache, else a download if allowed (see
`fvgen.pipelines.hub`). They have a licence of their own, see the model card. The network predicts inverse depth for a
camera whose focal length is the image's width; the true focal length, which the poses come with, turns it into metres,
and anchors turn these into scene units: `align_inverse_depth`, view by view.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from fvgen.depth.sparse import anchors, lacks_anchors
from fvgen.errors import UserError, first_line
from fvgen.geometry.alignment import align_inverse_depth
from fvgen.scenes.images import fit_depth
from fvgen.scenes.scene import Scene
from fvgen.system.doors import read_object

REPOSITORY = "apple/DepthPro-hf"
FILES = ("*.json", "*.safetensors")
FEWEST = 3  # anchors in a view
FARTHEST = 1e4  # metres: the processor's own limit
BENT = 0.01  # share of pixels behind infinity above which the shift is given up


def lacks(scene: Scene | None) -> str | None:
    """None in place of a scene asks for the network alone; one photograph needs no anchors: its unit is the metre."""
    if not find_spec("transformers.models.depth_pro"):
        return "this transformers has no Depth Pro: `pip install -U transformers`"
    cached = isinstance(try_to_load_from_cache(REPOSITORY, "model.safetensors"), str)
    if not (os.environ.get("FVGEN_DEPTH_PRO") or cached or os.environ.get("FVGEN_DOWNLOAD") == "1"):
        return f"the weights of {REPOSITORY} are not here: name their folder in FVGEN_DEPTH_PRO or set FVGEN_DOWNLOAD=1"
    return None if scene is None or _alone(scene) else lacks_anchors(scene)


def _alone(scene: Scene) -> bool:
    """One photograph that nobody posed (`fvgen.posing.two_views.pose_single`): its camera is the world."""
    alone = len(scene) == 1 and lacks_anchors(scene) is not None
    return alone and bool((scene.cameras.world_from_cam[0] == torch.eye(4)).all())


def run(scene: Scene, views: Sequence[int], height: int, width: int) -> Tensor:
    """Raises UserError for weights that cannot be had or used, and for a view without `FEWEST` anchors."""
    network, processor = _network(_weights())
    out = []
    for view in views:
        if _alone(scene):
            focal = scene.cameras.intrinsics[view, 0, 0].item()
            out.append(fit_depth(1 / metric_inverse_depth(network, processor, scene.image(view), focal), height, width))
            continue
        pixels, true = anchors(scene, view)
        if len(true) < FEWEST:
            raise UserError(
                f"image {scene.image_paths[view]} has {len(true)} points of known depth, too few to tell the scale of "
                "Depth Pro's; choose another source of points or add photographs beside it"
            )
        image = scene.image(view)
        inverse = metric_inverse_depth(network, processor, image, scene.cameras.intrinsics[view, 0, 0].item())
        out.append(fit_depth(in_scene_units(inverse, pixels, true), height, width))
    return torch.stack(out)


@torch.no_grad()
def metric_inverse_depth(network, processor, image: np.ndarray, focal: float) -> Tensor:
    """[H, W] in 1/m of a photograph uint8 [H, W, 3] whose focal length in pixels is known."""
    pixels = processor(images=image, return_tensors="pt")["pixel_values"].to(network.device)
    canonical = network(pixels).predicted_depth[None].float().cpu()
    size = image.shape[:2]
    inverse = interpolate(canonical * (size[1] / focal), size=size, mode="bilinear", align_corners=False)[0, 0]
    return inverse.clamp(min=1 / FARTHEST)


def in_scene_units(inverse: Tensor, pixels: Tensor, true: Tensor) -> Tensor:
    """Depth [H, W] (0 unknown) from inverse depth of unknown scale and shift, by anchors: pixels [M, 2], depths [M]."""
    unit = 2 * pixels / pixels.new_tensor([inverse.shape[1], inverse.shape[0]]) - 1
    at_anchors = grid_sample(
        inverse[None, None], unit[None, None], padding_mode="border", align_corners=False
    ).flatten()
    scale, shift = align_inverse_depth(at_anchors, true)
    if (scale * inverse + shift <= 0).float().mean() > BENT:
        scale, shift = align_inverse_depth(at_anchors, true, shift=False)
    aligned = scale * inverse + shift
    return torch.where(aligned > 0, 1 / aligned.clamp(min=torch.finfo(aligned.dtype).tiny), 0.0)


def _weights() -> Path:
    named = os.environ.get("FVGEN_DEPTH_PRO")
    if not named:
        from fvgen.pipelines.hub import fetch_folder  # it imports diffusers, which takes seconds

        return fetch_folder(REPOSITORY, FILES)
    if not Path(named).is_dir():
        raise UserError(f"FVGEN_DEPTH_PRO names {named}, which is not a folder; correct or unset the variable")
    return Path(named)


@lru_cache(maxsize=1)
def _network(folder: Path):
    from transformers import DepthProForDepthEstimation, DepthProImageProcessor

    from fvgen.pipelines.strict import judge_json  # it imports diffusers, which takes seconds

    try:
        for file in folder.glob("*.json"):
            judge_json(read_object(file), file)
        processor = DepthProImageProcessor.from_pretrained(folder, local_files_only=True)
        network = DepthProForDepthEstimation.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, use_fov_model=False
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{folder} holds no usable Depth Pro ({first_line(error)}); download it again") from error
    return network.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor
