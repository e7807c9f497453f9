"""The report of a run: report.json for programs, report.html for eyes. docs/report.md documents both."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from fvgen.diagnosis import Diagnosis
from fvgen.metrics.intervals import half_width, paired
from fvgen.reports.curves import Rows, loss_curves
from fvgen.system.doors import packaged_text, problem, read_text
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
ALWAYS_SHOWN = tuple(TABLE)[:5]  # the other columns appear when a row has a value; a note says why one has not
GAINS = (("student", "teacher_few"), ("student", "teacher"), ("gan_init", "teacher_few"))
PICTURE_BYTES = 2_000_000  # of all clips together, before base64 adds a third
ENCODINGS = (  # tried in this order until the pictures fit: factor to shrink by, options for Pillow
    (1, {"lossless": True}),
    (1, {"quality": 92}),
    (1, {"quality": 75}),
    (2, {"quality": 75}),
    (4, {"quality": 75}),
)

REPORT, CLIPS = "report.json", "clips.json"

MARK = '<meta name="generator" content="fvgen">'
"""In the head of every page: whose it is, and so who may replace it."""


@dataclass(frozen=True)
class ReportClip:
    """One clip: a name, and videos [F, 3, H, W] in [0, 1] by column (keys of `LABELS`, or whatever a page has columns
    for). ``known``: the frames that were given, by their places."""

    name: str
    videos: Mapping[str, Tensor]
    known: Sequence[int] = ()

    def __post_init__(self) -> None:
        assert self.videos and len({video.shape for video in self.videos.values()}) == 1, (
            "the videos of a clip share one shape"
        )


def write_report(
    out_dir: str | Path,
    report: Mapping[str, object],
    clips: Sequence[ReportClip],
    curves: Mapping[str, Rows],
    diagnoses: Sequence[Diagnosis] = (),
) -> None:
    """Write ``out_dir``/report.json, ``out_dir``/clips.json and ``out_dir``/report.html, each whole or not at all.

    report: the fields of docs/report.md; a NaN or infinity in it is written as null.
    clips: what the page animates; clips.json keeps it for `fvgen report`. curves: for each stage the rows of its
    metrics.jsonl, of which every key that contains ``loss`` is drawn over ``iteration``. diagnoses: of the stages.
    The page loads nothing from anywhere. Raises UserError when the disk is full or the folder not writable.
    """
    report, shown = _finite(report), pictures(clips)
    write_json(Path(out_dir) / REPORT, report)
    write_json(Path(out_dir) / CLIPS, shown)
    with atomic_path(Path(out_dir) / "report.html") as temporary:
        write_text(temporary, render_page(report, shown, curves, diagnoses))


def render_page(
    report: Mapping[str, object],
    shown: Sequence[Mapping[str, object]],
    curves: Mapping[str, Rows],
    diagnoses: Sequence[Diagnosis] = (),
) -> str:
    """The page as HTML; every text in it, such as a scene's name, is escaped by the template engine. ``shown``: of
    `pictures`."""
    header, rows, notes = table(report["rows"])
    return page_template("page.html.jinja").render(
        report=report,
        rows=report["rows"],
        header=header,
        table=rows,
        notes=notes,
        gains=gains(report["rows"]),
        clips=shown,
        labels=LABELS,
        extras=EXTRAS,
        curves={stage: loss_curves(metrics) for stage, metrics in curves.items()},
        diagnoses=diagnoses,
    )


def is_page(file: Path) -> bool:
    """Whether a file is a page that fvgen wrote."""
    return problem(file) is None and MARK in read_text(file, errors="replace")[:500]


def page_template(name: str) -> jinja2.Template:
    """One of the package's pages, escaping texts by itself."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda part: packaged_text("fvgen.reports", part)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = lambda value: "–" if value is None else f"{value:.3g}"
    return environment.get_template(name)


@dataclass(frozen=True)
class Cell:
    """``text``; ``half``: half of its 95 % interval, '' where none is known; ``note``: number of its footnote."""

    text: str
    half: str = ""
    note: int | None = None


def table(rows: Mapping[str, Mapping]) -> tuple[list[str], list[tuple[str, list[Cell]]], list[str]]:
    """Header, rows (key, cells), and footnotes. A column without any value is left out, and a note says why."""
    keys = [key for key in TABLE if key in ALWAYS_SHOWN or any(row.get(key) is not None for row in rows.values())]
    notes: list[str] = []
    body = [(name, [_cell(rows[name], key, notes) for key in keys]) for name in sorted(rows, key=list(LABELS).index)]
    why = {key: row["why_null"][key] for row in rows.values() for key in row.get("why_null", {}) if key not in keys}
    for reason in dict.fromkeys(why.values()):
        names = [TABLE[key][0].rstrip(" ↓↑") for key in TABLE if why.get(key) == reason]
        notes += [f"{', '.join(names)} {'are' if len(names) > 1 else 'is'} left out: {reason}"]
    return headers(keys, rows.values()), body, notes


def headers(keys: Iterable[str], rows: Iterable[Mapping]) -> list[str]:
    """Of columns; LPIPS with its backbone."""
    nets = {row["lpips_net"] for row in rows if row.get("lpips_net")}
    lpips = f"LPIPS ({', '.join(sorted(nets))})" if nets else "LPIPS"
    return [TABLE[key][0].replace("LPIPS", lpips) for key in keys]


def gains(rows: Mapping[str, Mapping]) -> list[tuple[str, str, list[tuple[str, Cell]]]]:
    """(row, other row, [(metric, difference)]) paired by clip, for what `GAINS` compares and the rows know by clip."""
    found = []
    for one, other in GAINS:
        ours, theirs = (rows.get(name, {}).get("by_clip", {}) for name in (one, other))
        cells = []
        for key in (key for key in TABLE if key in ours and key in theirs):
            pairs = [(a, b) for a, b in zip(ours[key], theirs[key], strict=True) if None not in (a, b)]
            if (difference := paired([a for a, _ in pairs], [b for _, b in pairs])) is not None:
                form = TABLE[key][1]
                half = difference["half_width"]
                said = "" if math.isnan(half) else f"± {half:{form}}"
                cells.append((TABLE[key][0], Cell(f"{difference['mean']:+{form}}", said)))
        if cells:
            found.append((one, other, cells))
    return found


def pictures(clips: Sequence[ReportClip]) -> list[dict]:
    """For each clip its name, frame count, size, known frames, and the videos as contact sheets in data addresses."""
    for shrink, options in ENCODINGS:
        sheets = [{key: sheet_of(video, shrink, options) for key, video in clip.videos.items()} for clip in clips]
        if sum(len(data) for sheet in sheets for data in sheet.values()) <= PICTURE_BYTES:
            break
    out = []
    for clip, sheet in zip(clips, sheets, strict=True):
        frames, _, height, width = next(iter(clip.videos.values())).shape
        addresses = {key: data_address(sheet[key]) for key in sorted(sheet, key=_column)}
        size = {"frames": frames, "columns": _sheet_columns(frames), "height": height, "width": width}
        out.append({"name": clip.name, **size, "known": list(clip.known), "sheets": addresses})
    return out


def data_address(webp: bytes) -> str:
    """An image that stands in the page itself."""
    return "data:image/webp;base64," + base64.b64encode(webp).decode()


def _cell(row: Mapping, key: str, notes: list[str]) -> Cell:
    """Text, interval over clips, and footnote number (from 1); a new reason is appended to ``notes``."""
    if row.get(key) is not None:
        values = [value for value in row.get("by_clip", {}).get(key, ()) if value is not None]
        half = half_width(values)
        return Cell(format(row[key], TABLE[key][1]), "" if math.isnan(half) else f"± {half:{TABLE[key][1]}}")
    reason = row.get("why_null", {}).get(key)
    if reason is None:
        return Cell("–")
    if reason not in notes:
        notes.append(reason)
    return Cell("–", note=notes.index(reason) + 1)


def _column(key: str) -> int:
    """Its place on the page: that in `LABELS`, and others before the truth, in the order given."""
    return list(LABELS).index(key) if key in LABELS else list(LABELS).index("truth") - 1


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


def _finite(value: object) -> object:
    """The same value with NaN and infinities replaced by None, for strict JSON readers."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
