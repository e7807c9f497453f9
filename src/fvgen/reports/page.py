"""The report of a run: report.json for programs, report.html for eyes. docs/report.md documents both."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from fvgen.system.doors import packaged_text
from fvgen.system.files import atomic_path, write_json, write_text

LABELS = {  # of the rows and columns, in the order shown
    "render": "Point render",
    "teacher": "Teacher",
    "teacher_few": "Teacher, few steps",
    "gan_init": "After stage 1",
    "student": "Student",
    "truth": "Truth",
}
EXTRAS = ("teacher_few", "gan_init")  # columns that the page shows on request
TABLE = {  # report key: header, format
    "steps": ("Steps", "d"),
    "nfe": ("Evaluations (NFE)", "d"),
    "seconds_per_clip": ("Seconds per clip", ".3g"),
    "psnr": ("PSNR ↑", ".2f"),
    "ssim": ("SSIM ↑", ".3f"),
    "lpips": ("LPIPS ↓", ".3f"),
    "fid": ("FID ↓", ".1f"),
    "kid": ("KID ↓", ".4f"),
    "kid_squeeze": ("SqueezeNet MMD ↓", ".4f"),
}
ALWAYS_SHOWN = tuple(TABLE)[:7]  # the other columns appear when a row has a value
PICTURE_BYTES = 2_000_000  # of all clips together, before base64 adds a third
ENCODINGS = (  # tried in this order until the pictures fit: factor to shrink by, options for Pillow
    (1, {"lossless": True}),
    (1, {"quality": 92}),
    (1, {"quality": 75}),
    (2, {"quality": 75}),
    (4, {"quality": 75}),
)
CURVE_BINS = 50
LOG_RATIO = 30  # a loss that spans more than this factor gets a logarithmic axis

MARK = '<meta name="generator" content="fvgen">'
"""In the head of every page: whose it is, and so who may replace it."""


@dataclass(frozen=True)
class ReportClip:
    """One evaluated clip: a name, and videos [F, 3, H, W] in [0, 1] by column (keys of `LABELS`)."""

    name: str
    videos: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        assert self.videos and not set(self.videos) - set(LABELS), list(self.videos)
        assert len({video.shape for video in self.videos.values()}) == 1, "the videos of a clip share one shape"


@dataclass(frozen=True)
class Curve:
    """A loss, ready to draw in the unit square, y pointing down: SVG point lists, (position, text) ticks."""

    name: str
    line: str
    band: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def write_report(
    out_dir: str | Path,
    report: Mapping[str, object],
    clips: Sequence[ReportClip],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
    """Write ``out_dir``/report.json and ``out_dir``/report.html, each whole or not at all.

    report: the fields of docs/report.md; a NaN or infinity in it is written as null.
    clips: what the page animates. curves: for each stage the rows of its metrics.jsonl, of which every key
    that contains ``loss`` is drawn over ``iteration``.
    The page loads nothing from anywhere. Raises UserError when the disk is full or the folder not writable.
    """
    report = _finite(report)
    write_json(Path(out_dir) / "report.json", report)
    with atomic_path(Path(out_dir) / "report.html") as temporary:
        write_text(temporary, render_page(report, clips, curves))


def render_page(
    report: Mapping[str, object],
    clips: Sequence[ReportClip],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
) -> str:
    """The page as HTML; every text in it, such as a scene's name, is escaped by the template engine."""
    header, rows, notes = table(report["rows"])
    return page_template("page.html.jinja").render(
        report=report,
        rows=report["rows"],
        header=header,
        table=rows,
        notes=notes,
        clips=pictures(clips),
        labels=LABELS,
        extras=EXTRAS,
        curves={stage: loss_curves(metrics) for stage, metrics in curves.items()},
    )


def page_template(name: str) -> jinja2.Template:
    """One of the package's pages, escaping texts by itself."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["short"] = lambda value: "–" if value is None else f"{value:.3g}"
    return environment.from_string(packaged_text("fvgen.reports", name))


def table(
    rows: Mapping[str, Mapping],
) -> tuple[list[str], list[tuple[str, list[tuple[str, int | None]]]], list[str]]:
    """Header, rows (key, cells), and footnotes. A cell is its text and the number of its footnote or None."""
    keys = [key for key in TABLE if key in ALWAYS_SHOWN or any(row.get(key) is not None for row in rows.values())]
    notes: list[str] = []
    body = []
    for name in sorted(rows, key=list(LABELS).index):
        cells = [_cell(rows[name], key, notes) for key in keys]
        body.append((name, cells))
    nets = {row["lpips_net"] for row in rows.values() if row.get("lpips_net")}
    header = [TABLE[key][0].replace("LPIPS", f"LPIPS ({', '.join(sorted(nets))})" if nets else "LPIPS") for key in keys]
    return header, body, notes


def pictures(clips: Sequence[ReportClip]) -> list[dict]:
    """For each clip its name, frame count, size, and the videos as contact sheets in data addresses."""
    for shrink, options in ENCODINGS:
        sheets = [{key: sheet_of(video, shrink, options) for key, video in clip.videos.items()} for clip in clips]
        if sum(len(data) for sheet in sheets for data in sheet.values()) <= PICTURE_BYTES:
            break
    out = []
    for clip, sheet in zip(clips, sheets, strict=True):
        frames, _, height, width = next(iter(clip.videos.values())).shape
        addresses = {key: data_address(sheet[key]) for key in LABELS if key in sheet}
        size = {"frames": frames, "columns": _sheet_columns(frames), "height": height, "width": width}
        out.append({"name": clip.name, **size, "sheets": addresses})
    return out


def data_address(webp: bytes) -> str:
    """An image that stands in the page itself."""
    return "data:image/webp;base64," + base64.b64encode(webp).decode()


def loss_curves(metrics: Sequence[Mapping[str, float]]) -> list[Curve]:
    """One `Curve` for each key that contains ``loss`` and has at least two finite values."""
    names = sorted({key for row in metrics for key in row if "loss" in key})
    points = {name: _points(metrics, name) for name in names}
    return [_curve(name, *xy) for name, xy in points.items() if len(xy[0]) > 1]


def _cell(row: Mapping, key: str, notes: list[str]) -> tuple[str, int | None]:
    """Text and footnote number (from 1); a new reason is appended to ``notes``."""
    if row.get(key) is not None:
        return format(row[key], TABLE[key][1]), None
    reason = row.get("why_null", {}).get(key)
    if reason is None:
        return "–", None
    if reason not in notes:
        notes.append(reason)
    return "–", notes.index(reason) + 1


def _sheet_columns(frames: int) -> int:
    """Frames per line of a contact sheet; near square, because a WebP side ends at 16383 pixels."""
    return math.ceil(math.sqrt(frames))


def sheet_of(video: Tensor, shrink: int, options: dict, columns: int | None = None) -> bytes:
    """The frames [F, 3, H, W] on one WebP image, line by line; near square if ``columns`` are not given."""
    video = video.detach().cpu().float()
    if shrink > 1:
        video = interpolate(video, scale_factor=1 / shrink, mode="bicubic", antialias=True)
    columns = columns or _sheet_columns(len(video))
    missing = -len(video) % columns
    frames = torch.cat([video, video.new_zeros(missing, *video.shape[1:])]).clamp(0, 1).mul(255).round().byte()
    sheet = rearrange(frames, "(line column) c h w -> (line h) (column w) c", column=columns)
    buffer = io.BytesIO()
    Image.fromarray(sheet.numpy()).save(buffer, "webp", **options)
    return buffer.getvalue()


def _points(metrics: Sequence[Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values of one loss, finite ones only; it need not be in every row."""
    pairs = [(row.get("iteration", i), row[name]) for i, row in enumerate(metrics) if row.get(name) is not None]
    pairs = [(x, y) for x, y in pairs if math.isfinite(y)]
    return np.array([x for x, _ in pairs], float), np.array([y for _, y in pairs], float)


def _curve(name: str, x: np.ndarray, y: np.ndarray) -> Curve:
    """The mean and the 10th to 90th percentile in bins along x: calmer than every iteration, and small."""
    bins = [part for part in np.array_split(np.arange(len(x)), min(CURVE_BINS, len(x))) if len(part)]
    centers = np.array([x[part].mean() for part in bins])
    middle = np.array([y[part].mean() for part in bins])
    low, high = (np.array([np.percentile(y[part], q) for part in bins]) for q in (10, 90))
    low, high = np.minimum(low, middle), np.maximum(high, middle)
    logarithmic = low.min() > 0 and high.max() / low.min() > LOG_RATIO
    ticks = _decades(low.min(), high.max()) if logarithmic else _round_numbers(low.min(), high.max())
    to_axis = np.log10 if logarithmic else np.asarray
    bottom, top = to_axis(min(low.min(), ticks[0])), to_axis(max(high.max(), ticks[-1]))
    left, right = x[0], x[-1]

    def place_x(values: Iterable[float]) -> np.ndarray:
        return (np.asarray(values, float) - left) / max(right - left, 1e-9)

    def place_y(values: Iterable[float]) -> np.ndarray:
        return 1 - (to_axis(np.asarray(values, float)) - bottom) / max(top - bottom, 1e-9)

    px = place_x(centers)
    band = np.concatenate([np.stack([px, place_y(high)], 1), np.stack([px, place_y(low)], 1)[::-1]])
    x_ticks = [value for value in _round_numbers(left, right) if left <= value <= right]
    return Curve(
        name=name,
        line=_svg_points(np.stack([px, place_y(middle)], 1)),
        band=_svg_points(band),
        x_ticks=[(float(p), f"{value:g}") for p, value in zip(place_x(x_ticks), x_ticks, strict=True)],
        y_ticks=[(float(p), f"{value:g}") for p, value in zip(place_y(ticks), ticks, strict=True)],
    )


def _round_numbers(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` multiples of 1, 2 or 5 times a power of ten, covering low to high."""
    span = max(high - low, abs(high) * 1e-6, 1e-12)
    power = 10 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * count >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.6g}") for i in range(first, max(last, first + 1) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten from at or below low to at or above high."""
    return [10.0**i for i in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def _svg_points(xy: np.ndarray) -> str:
    return " ".join(f"{x:.4f},{y:.4f}" for x, y in xy)


def _finite(value: object) -> object:
    """The same value with NaN and infinities replaced by None, for strict JSON readers."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
