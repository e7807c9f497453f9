"""A folder of clips with their pixels: ``clips.safetensors`` (all clips, stacked, 8-bit; ``shown`` where any has masks,
``world_from_cam`` and ``intrinsics`` where all have cameras, ``other_images`` and what belongs to them where all have
other views) and ``index.json`` (names, sizes, provenance). Its latents are cached beside it: see `fvgen.clips.latents`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from fvgen.clips.clip import Clip, Others, shown_of, to_bytes
from fvgen.errors import UserError, first_line
from fvgen.geometry.cameras import Cameras
from fvgen.system.doors import open_tensors, read_object
from fvgen.system.files import atomic_path, new_folder, write_tensors, write_text

FORMAT = 1
KINDS = ["U8", "U8", "BOOL"]  # of truth, render and known
CAMERAS = {"world_from_cam": [4, 4], "intrinsics": [3, 3]}  # float32, of every frame
OTHERS, DEPTH = "other_", "depth"  # `Others`: 8-bit images and cameras like a clip's, each named so; depth float16


class ClipFolder:
    """A folder of prepared clips, read lazily: ``folder[i]`` is a `Clip`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index = _read_index(self.path)
        self.names: list[str] = self.index["names"]
        file = self.path / "clips.safetensors"
        cure = f"delete {path} and prepare it again"
        try:
            self._file = open_tensors(file)
            keys = set(self._file.keys())
            self._masked, self._posed = "shown" in keys, not keys.isdisjoint(CAMERAS)
            self._others, self._deep = f"{OTHERS}images" in keys, DEPTH in keys
            self._masked_others = f"{OTHERS}shown" in keys
            found = {key: self._file.get_slice(key) for key in ("truth", "render", "known")}
        except (SafetensorError, UserError) as error:
            reason = getattr(error, "reason", first_line(error))
            raise UserError(f"{file} is damaged or missing ({reason}); {cure}") from error
        truth, render, known = (tensor.get_shape() for tensor in found.values())
        kinds = [tensor.get_dtype() for tensor in found.values()]
        if (
            len(truth) != 5
            or truth != render
            or known != truth[:2]
            or truth[0] != len(self.names)
            or kinds != KINDS
            or 0 in truth
            or (self._masked and not self._fits_masks(truth))
            or (self._posed and not (keys.issuperset(CAMERAS) and self._fits_cameras(truth[:2])))
            or (self._others and not self._fits_others(truth, keys))
        ):
            raise UserError(f"{file} does not fit its index.json; {cure}")
        self.frames, self.height, self.width = truth[1], truth[3], truth[4]

    def _fits_masks(self, truth: Sequence[int]) -> bool:
        shown = self._file.get_slice("shown")
        return (shown.get_dtype(), list(shown.get_shape())) == ("BOOL", [*truth[:2], *truth[3:]])

    def _fits_cameras(self, many: Sequence[int], prefix: str = "") -> bool:
        slices = {name: self._file.get_slice(prefix + name) for name in CAMERAS}
        kinds = {name: (each.get_dtype(), list(each.get_shape())) for name, each in slices.items()}
        return kinds == {name: ("F32", [*many, *size]) for name, size in CAMERAS.items()}

    def _fits_others(self, truth: Sequence[int], keys: set[str]) -> bool:
        images = self._file.get_slice(f"{OTHERS}images")
        shape = list(images.get_shape())
        if (images.get_dtype(), len(shape)) != ("U8", 5) or [shape[0], *shape[2:]] != [truth[0], *truth[2:]]:
            return False
        if not (self._posed and keys.issuperset({f"{OTHERS}{name}" for name in CAMERAS})):
            return False
        if self._deep:
            depth = self._file.get_slice(DEPTH)
            deep = [truth[0], truth[1] + shape[1], *truth[3:]]
            if (depth.get_dtype(), list(depth.get_shape())) != ("F16", deep):
                return False
        if self._masked_others:
            shown = self._file.get_slice(f"{OTHERS}shown")
            if (shown.get_dtype(), list(shown.get_shape())) != ("BOOL", [*shape[:2], *truth[3:]]):
                return False
        return self._fits_cameras(shape[:2], OTHERS)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Clip:
        truth, render = (self._file.get_slice(key)[index].float() / 255 for key in ("truth", "render"))
        shown = self._file.get_slice("shown")[index] if self._masked else None
        known, others = self._file.get_slice("known")[index], self._read_others(index) if self._others else None
        return Clip(self.names[index], truth, render, known, self.cameras(index), shown, others)

    def cameras(self, index: int) -> Cameras | None:
        """Those of one clip, without its pixels."""
        if not self._posed:
            return None
        return Cameras(*(self._file.get_slice(name)[index] for name in CAMERAS), self.height, self.width)

    def _read_others(self, index: int) -> Others:
        images = self._file.get_slice(f"{OTHERS}images")[index].float() / 255
        matrices = (self._file.get_slice(f"{OTHERS}{name}")[index] for name in CAMERAS)
        depth = self._file.get_slice(DEPTH)[index].float() if self._deep else None
        shown = self._file.get_slice(f"{OTHERS}shown")[index] if self._masked_others else None
        return Others(images, Cameras(*matrices, self.height, self.width), depth, shown)


def save_clips(path: str | Path, clips: Sequence[Clip], source: dict) -> ClipFolder:
    """Write clips of one size to the folder ``path``, whole or not at all; ``source`` says where they come from.

    Replaces earlier clips; raises UserError for a folder that holds anything else, and for a full disk.
    """
    if Path(path).is_dir() and any(Path(path).iterdir()) and not (Path(path) / "index.json").exists():
        raise UserError(f"{path} holds something other than prepared clips; choose another folder for them")
    shapes = {tuple(clip.truth.shape) for clip in clips}
    assert len(shapes) == 1, f"clips of one size expected, got {shapes}"
    tensors = {
        "truth": torch.stack([to_bytes(clip.truth) for clip in clips]),
        "render": torch.stack([to_bytes(clip.render) for clip in clips]),
        "known": torch.stack([clip.known for clip in clips]),
    }
    if any(clip.shown is not None for clip in clips):
        tensors["shown"] = torch.stack([shown_of(clip) for clip in clips])
    if all(clip.cameras is not None for clip in clips):
        tensors |= {name: torch.stack([getattr(clip.cameras, name).float() for clip in clips]) for name in CAMERAS}
    if all(clip.others is not None for clip in clips):
        tensors |= _stacked_others([clip.others for clip in clips])
    frames, _, height, width = shapes.pop()
    index = {
        "format": FORMAT,
        "frames": frames,
        "height": height,
        "width": width,
        "source": source,
        "names": [clip.name for clip in clips],
    }
    with atomic_path(path) as folder:
        new_folder(folder)
        write_tensors(folder / "clips.safetensors", tensors)
        write_text(folder / "index.json", json.dumps(index, indent=1) + "\n")
    return ClipFolder(path)


def _stacked_others(all_others: Sequence[Others]) -> dict[str, torch.Tensor]:
    assert len({len(others.cameras) for others in all_others}) == 1, "as many other views for every clip expected"
    cameras = {name: torch.stack([getattr(o.cameras, name).float() for o in all_others]) for name in CAMERAS}
    tensors = {f"{OTHERS}{name}": matrices for name, matrices in cameras.items()}
    tensors[f"{OTHERS}images"] = torch.stack([to_bytes(others.images) for others in all_others])
    if any(others.shown is not None for others in all_others):
        tensors[f"{OTHERS}shown"] = torch.stack([shown_of(others) for others in all_others])
    if all(others.depth is not None for others in all_others):
        tensors[DEPTH] = torch.stack([others.depth.half() for others in all_others])
    return tensors


def _read_index(path: Path) -> dict:
    file = path / "index.json"
    if not path.is_dir():
        state = "is a file, not a folder" if path.exists() else "does not exist"
        raise UserError(f"data folder {path} {state}; prepare clips first or give another folder")
    try:
        index = read_object(file)
        names = index["names"]
        if index["format"] != FORMAT or not names or not isinstance(names, list):
            raise KeyError("format")
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise KeyError("names")
    except (UserError, KeyError) as error:
        raise UserError(f"{file} is no index of prepared clips; prepare them again or give another folder") from error
    return index
