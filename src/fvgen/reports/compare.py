"""`fvgen evaluate`: images of one place against those of another, any number of them, a batch in memory at a time."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.errors import UserError
from fvgen.metrics import METRICS, Unavailable, frechet_distance, inception_features, kernel_distance, psnr, ssim
from fvgen.metrics.frechet import squeeze_distance, squeeze_features
from fvgen.metrics.image import lpips
from fvgen.reports.camera_scores import PER_CAMERA, camera_scores, commanded
from fvgen.reports.frames import Frames, matched, open_frames
from fvgen.system.doors import read_object
from fvgen.system.files import atomic_path, judge_output, write_json, write_text

BATCH = 64  # frames in memory: 130 MB at 320x512
PER_FRAME = ("psnr", "ssim", "lpips")


def compare(
    predicted: str | Path, truth: str | Path | None = None, out: str | Path | None = None, cameras: bool = False
) -> dict[str, Any]:
    """Every metric of the pictures in ``predicted`` against those in ``truth``: means, the reason for each that is
    None, and ``frames``, a row each. ``cameras``: also `fvgen.reports.camera_scores`, which do without a truth where
    ``predicted`` is what `fvgen generate` wrote. ``out``: a JSON file to write, and beside it a CSV of the rows.

    Raises UserError for sets that do not match, of other sizes, or empty, and where ``cameras`` are not known.
    """
    if truth is None and not cameras:
        raise UserError(f"there is nothing to compare {predicted} with; name the true pictures, or add --cameras")
    out = None if out is None else judge_scores(out, predicted, truth)
    ours, theirs = open_frames(predicted), None if truth is None else open_frames(truth)
    names = ours.names if theirs is None else matched(ours, theirs)
    obeyed = camera_scores(commanded(ours, theirs), names) if cameras else None
    result: dict[str, Any] = {"predicted": str(predicted), "truth": None if truth is None else str(truth)}
    rows: list[dict[str, Any]] = [{"name": name} for name in names]
    if theirs is None:
        result |= {"n": len(names), "why_null": {}}
    else:
        tally = Tally()
        for one, other in _batches(ours, theirs, names):
            tally.add(one, other)
        result |= tally.result()
        rows = [row | more for row, more in zip(rows, tally.rows, strict=True)]
    if obeyed is not None:
        result |= obeyed.scores
        result["why_null"] |= obeyed.why
        rows = [row | obeyed.rows.get(number, dict.fromkeys(PER_CAMERA)) for number, row in enumerate(rows)]
    result["frames"] = rows
    if out is not None:
        write_json(out, result)
        text = io.StringIO()
        table = csv.DictWriter(text, rows[0])
        table.writeheader()
        table.writerows(rows)
        with atomic_path(out.with_suffix(".csv")) as temporary:
            write_text(temporary, text.getvalue())
    return result


def judge_scores(out: str | Path, predicted: str | Path, truth: str | Path | None) -> Path:
    """Raises UserError where scores cannot go: what is there is replaced only if it holds scores."""

    def ours(file: Path) -> bool:
        try:
            return {"predicted", "truth", "frames"} <= read_object(file).keys()
        except UserError:
            return False

    path = judge_output(out, ours, [place for place in (predicted, truth) if place is not None])
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


def _size(image: Tensor) -> str:
    return f"{image.shape[1]}x{image.shape[2]}"
