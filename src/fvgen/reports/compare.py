"""`fvgen evaluate`: images of one place against those of another, any number of them, a batch in memory at a time."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.errors import UserError
from fvgen.metrics import METRICS, Unavailable, frechet_distance, inception_features, kernel_distance, psnr, ssim
from fvgen.metrics.frechet import squeeze_distance, squeeze_features
from fvgen.metrics.image import lpips
from fvgen.scenes.formats import read_scene, scene_format
from fvgen.scenes.images import load_image
from fvgen.scenes.readers.photographs import VIDEOS, is_picture, video_frames
from fvgen.system.doors import read_object, there
from fvgen.system.files import atomic_path, judge_output, write_json, write_text

BATCH = 64  # frames in memory: 130 MB at 320x512
PER_FRAME = ("psnr", "ssim", "lpips")


@dataclass(frozen=True)
class Frames:
    """Named pictures, read one after the other: ``read`` gives [3, H, W] in [0, 1] each, in the order of ``names``."""

    place: Path
    names: list[str]
    read: Callable[[], Iterator[Tensor]]


def open_frames(place: str | Path) -> Frames:
    """Of a folder of pictures, a data set (its views), or a video. Raises UserError."""
    path = Path(place)
    if not there(path):
        raise UserError(f"{path} does not exist; check the path")
    if path.suffix.lower() in VIDEOS:
        count = sum(1 for _ in video_frames(path))

        def decoded() -> Iterator[Tensor]:
            return (_tensor(pixels()) for pixels in video_frames(path))

        return Frames(path, [f"{k:05d}" for k in range(count)], decoded)
    if not path.is_dir():
        raise UserError(f"{path} is neither a folder nor a video; give a folder of pictures, a data set or a video")
    if scene_format(path):
        scene = read_scene(path)
        views = range(len(scene.image_paths))
        names = [file.stem for file in scene.image_paths]
        return Frames(path, names, lambda: (_tensor(scene.image(view)) for view in views))
    files = sorted(file for file in path.iterdir() if is_picture(file))
    if not files:
        raise UserError(f"{path} holds no pictures; give a folder of pictures, a data set or a video")
    return Frames(path, [file.stem for file in files], lambda: (_tensor(load_image(file)) for file in files))


def matched(predicted: Frames, truth: Frames) -> list[str]:
    """The names under which pairs are listed: pictures match by name where all names do, else by their order. Raises
    UserError where neither is possible."""
    if predicted.names == truth.names:
        return predicted.names
    if len(predicted.names) == len(truth.names) and not set(predicted.names) & set(truth.names):
        return predicted.names
    only = sorted(set(predicted.names) ^ set(truth.names))
    if len(predicted.names) != len(truth.names):
        raise UserError(
            f"{predicted.place} has {len(predicted.names)} pictures, {truth.place} has {len(truth.names)}; give sets "
            "that match"
        )
    raise UserError(f"{predicted.place} and {truth.place} do not match: {only[0]} is in one of them; name them alike")


def compare(predicted: str | Path, truth: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """Every metric of the pictures in ``predicted`` against those in ``truth``: means, the reason for each that is
    None, and ``frames``, a row each. ``out``: a JSON file to write, and beside it a CSV of the rows.

    Raises UserError for sets that do not match, of other sizes, or empty.
    """
    out = None if out is None else judge_scores(out, predicted, truth)
    ours, theirs = open_frames(predicted), open_frames(truth)
    names = matched(ours, theirs)
    tally = Tally()
    for one, other in _batches(ours, theirs, names):
        tally.add(one, other)
    result = {"predicted": str(predicted), "truth": str(truth), **tally.result()}
    rows = [{"name": name, **row} for name, row in zip(names, tally.rows, strict=True)]
    if out is not None:
        write_json(out, result | {"frames": rows})
        text = io.StringIO()
        table = csv.DictWriter(text, ("name", *PER_FRAME))
        table.writeheader()
        table.writerows(rows)
        with atomic_path(out.with_suffix(".csv")) as temporary:
            write_text(temporary, text.getvalue())
    return result | {"frames": rows}


def judge_scores(out: str | Path, predicted: str | Path, truth: str | Path) -> Path:
    """Raises UserError where scores cannot go: what is there is replaced only if it holds scores."""

    def ours(file: Path) -> bool:
        try:
            return {"predicted", "truth", "frames"} <= read_object(file).keys()
        except UserError:
            return False

    path = judge_output(out, ours, [predicted, truth])
    if path.suffix != ".json":
        raise UserError(f"--out {path} does not end in .json; name a JSON file")
    if path.with_suffix(".csv").exists() and not path.exists():
        raise UserError(f"--out {path} would replace {path.with_suffix('.csv')}; choose another name")
    return path


class Tally:
    """Metrics of pairs of pictures, added batch by batch: means of rows, and features for the distances of sets."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float | None]] = []
        self.features: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        self.why: dict[str, str] = {}
        self.net: str | None = None

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """[B, 3, H, W] each, in [0, 1]."""
        columns: dict[str, Tensor | None] = {"psnr": psnr(predicted, truth)}
        columns["ssim"] = self._tried("ssim", lambda: ssim(predicted, truth))
        found = self._tried("lpips", lambda: lpips(predicted, truth))
        columns["lpips"], self.net = found or (None, None)
        for k in range(len(predicted)):
            self.rows.append({name: None if x is None else x[k].item() for name, x in columns.items()})
        for name, features_of in (("inception", inception_features), ("squeeze", squeeze_features)):
            pair = self._tried(name, lambda f=features_of: (f(predicted), f(truth)))
            if pair is not None:
                for kept, new in zip(self.features.setdefault(name, ([], [])), pair, strict=True):
                    kept.append(new)

    def result(self) -> dict[str, Any]:
        """Keys as `fvgen.metrics.score_images` has them."""
        scores: dict[str, Any] = dict.fromkeys(METRICS)
        for name in PER_FRAME:
            values = [row[name] for row in self.rows]
            scores[name] = None if None in values else sum(values) / len(values)
        sets = {name: tuple(torch.cat(rows) for rows in pair) for name, pair in self.features.items()}
        distances = {
            "fid": ("inception", frechet_distance),
            "kid": ("inception", kernel_distance),
            "kid_squeeze": ("squeeze", squeeze_distance),
        }
        for name, (features, distance) in distances.items():
            if features in sets:
                scores[name] = self._tried(name, lambda d=distance, f=features: d(*sets[f]))
            else:
                self.why[name] = self.why.get(features, "")
        why = {name: reason for name, reason in self.why.items() if name in METRICS and reason}
        return scores | {"lpips_net": self.net, "n": len(self.rows), "why_null": why}

    def _tried(self, name: str, compute: Callable[[], Any]) -> Any:
        if name in self.why:
            return None
        try:
            return compute()
        except Unavailable as reason:
            self.why[name] = str(reason)
            return None


def _batches(ours: Frames, theirs: Frames, names: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
    rows: list[tuple[Tensor, Tensor]] = []
    size = None
    for name, one, other in zip(names, ours.read(), theirs.read(), strict=True):
        if one.shape != other.shape:
            raise UserError(f"{name} is {_size(one)} in {ours.place} and {_size(other)} in {theirs.place}; resize one")
        if size is not None and one.shape != size:
            yield _stacked(rows)
            rows = []
        size = one.shape
        rows.append((one, other))
        if len(rows) == BATCH:
            yield _stacked(rows)
            rows = []
    if rows:
        yield _stacked(rows)


def _stacked(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([one for one, _ in rows]), torch.stack([other for _, other in rows])


def _tensor(pixels: Any) -> Tensor:
    """uint8 [H, W, 3] to [3, H, W] in [0, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _size(image: Tensor) -> str:
    return f"{image.shape[1]}x{image.shape[2]}"
