"""Some views of a scene as a scene of their own, in any format that it was read from; no pixel is copied."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fvgen.geometry.conventions import to_opengl
from fvgen.scenes.scene import Scene
from fvgen.system.files import atomic_path, new_folder, write_json

LENS = ("fl_x", "fl_y", "cx", "cy", "k1", "k2", "p1", "p2", "k3")


def write_subset(scene: Scene, views: Sequence[int], folder: Path) -> Path:
    """``transforms.json`` (nerfstudio's) in ``folder``, which names the photographs, depth maps and masks of these
    views where they are. Points of the whole scene are left out: who sees which would have to be numbered anew."""
    poses = to_opengl(scene.cameras.world_from_cam.double())
    frames = []
    for view in views:
        frame = {"file_path": _place(scene.image_paths[view]), "transform_matrix": poses[view].tolist()}
        if scene.lenses is None:
            matrix = scene.cameras.intrinsics[view].double()
            frame |= zip(LENS[:4], matrix[[0, 1], [0, 1]].tolist() + matrix[:2, 2].tolist(), strict=True)
        else:
            frame |= zip(LENS, scene.lenses[view].tolist(), strict=True)
        if scene.depth_paths is not None:
            frame["depth_file_path"] = _place(scene.depth_paths[view])
        if view in scene.masks:
            frame["mask_path"] = _place(scene.masks[view])
        frames.append(frame)
    document = {"camera_model": "OPENCV", "w": scene.cameras.width, "h": scene.cameras.height, "frames": frames}
    if scene.depth_paths is not None:
        document["depth_unit_scale_factor"] = scene.depth_unit
    with atomic_path(folder) as temporary:
        new_folder(temporary)
        write_json(temporary / "transforms.json", document)
    return folder


def _place(path: Path) -> str:
    return os.path.abspath(path)
