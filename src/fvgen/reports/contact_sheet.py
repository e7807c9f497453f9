"""`fvgen inspect`: shards or a scene on one HTML page, so that a person sees at a glance whether the data is right."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fvgen.clips.filters import LIMITS, MEANINGS
from fvgen.clips.from_scene import ClipSettings, Lost, scene_clips
from fvgen.clips.views import pose_distance, typical_depth
from fvgen.geometry.pointcloud import point_radius
from fvgen.posing.sources import Source, find_sources, open_source
from fvgen.reports.page import data_address, is_page, page_template, sheet_of
from fvgen.scenes.images import fit_image
from fvgen.scenes.scene import Scene
from fvgen.shards.encoders import load_encoders, placed
from fvgen.shards.format import CLOUD_POINTS, ClipRecord
from fvgen.shards.one_shard import one_thread, record_of
from fvgen.shards.reader import ShardSet, holds_shards
from fvgen.system.files import atomic_path, judge_output, write_text

THUMBNAIL = 96  # rows of a frame on the page, about
PHOTOGRAPHS = 24
SCENE_CLIPS, SHARD_CLIPS = 2, 8
SCENE_FRAMES, SCENE_ROWS = 8, 96  # of the clips that are made to show what a scene is good for


@dataclass(frozen=True)
class Plan:
    """A picture from above, ready to draw in a square of side 100: points (x, y, colour), the cameras' path as SVG
    points, and for each camera the triangle of what it sees."""

    points: list[tuple[float, float, str]]
    path: str
    cameras: list[str]


@dataclass(frozen=True)
class Row:
    """A clip on the page: facts as (name, text), moving pictures (`film`), a picture from above."""

    name: str
    facts: list[tuple[str, str]]
    clip: dict
    plan: Plan


def inspect(path: str | Path, out: str | Path, clips: int | None = None, teacher: str | None = None) -> Path:
    """Write the page of a shard folder or of a scene (`open_source`) to ``out``; returns it. Of a folder or a chunk of
    several scenes the first is shown, and the page says so.

    ``clips`` are spread evenly over the shards; of a scene they are made for the page. ``teacher`` decodes shards; None
    is the preset that encoded them. Raises UserError for a path that is neither, damaged shards, and another teacher.
    """
    inputs = [] if "://" in str(path) else [path]
    out = judge_output(out, is_page, inputs)
    page = _of_shards(path, clips, teacher) if holds_shards(path) else _of_scene(Path(path), clips)
    with atomic_path(out) as temporary:
        write_text(temporary, page_template("contact_sheet.html.jinja").render(**page))
    return out


def _of_shards(path: str | Path, clips: int | None, teacher: str | None) -> dict:
    shards = ShardSet(path)
    pipeline = placed(load_encoders(teacher or shards.settings.teacher), "cpu")
    shards.check_encoder(pipeline.encoder_fingerprint(), str(teacher or shards.settings.teacher))
    chosen = torch.linspace(0, len(shards) - 1, min(clips or SHARD_CLIPS, len(shards))).round().long().tolist()
    rows, latents = [], []
    for index in chosen:
        clip, record = shards[index], shards.records[index]
        # The render is the condition's tensor that is latents like the truth.
        render = next(x for x in clip.condition.values() if x.shape == clip.latents.shape)
        truth, render = (pipeline.decode_latents(part[None])[0] for part in (clip.latents, render))
        moving = film(record.name, {"render": render, "truth": truth}, record.known)
        colors = clip.cloud_colors.float() / 255
        plan = plan_view(clip.world_from_cam, clip.cloud_points, colors, _half_angle(clip.intrinsics, shards.width))
        rows.append(Row(record.name, _clip_facts(record, shards.settings.limits), moving, plan))
        latents.append(clip.latents)
    values, settings = torch.stack(latents), shards.settings
    strides = Counter("by pose" if record.stride is None else str(record.stride) for record in shards.records)
    facts = [
        ("clips", str(len(shards))),
        ("clips shown", shown_of(len(chosen), len(shards))),
        ("scenes", str(len({record.scene for record in shards.records}))),
        ("frames", f"{settings.frames} a clip, {_pixels(settings.height, settings.width)}"),
        ("shards", f"{len(shards.shards)}, {sum(shard.bytes for shard in shards.shards) / 2**20:.1f} MB"),
        ("frames apart", _counts(strides)),
        ("depth from", _counts(Counter(record.points for record in shards.records))),
        ("encoder", f"{settings.teacher} ({settings.encoder})"),
        ("latents shown", f"mean {values.mean():.3f}, deviation {values.std():.3f}"),
    ]
    for key in LIMITS:
        figures = torch.tensor([record.figures[key] for record in shards.records])
        name, unit, _ = MEANINGS[key]
        low = f"; clips below {settings.limits[key]:g} were dropped" if settings.limits.get(key) else ""
        span = f"{figures.min():.3g} to {figures.max():.3g}{f' {unit}' if unit else ''}"
        facts.append((name, f"{span}, median {figures.median():.3g}{low}"))
    lost = [(f"dropped {count}", reason) for reason, count in shards.dropped().items()]
    lost += [(f"skipped {entry.name}", entry.reason) for entry in shards.skipped()]
    decoded = "its latents, decoded"
    captions = {"render": ("Render", f"what the model is given: {decoded}"), "truth": ("Truth", decoded)}
    page = {"title": str(path), "facts": facts, "lost": lost, "rows": rows, "captions": captions}
    return page | {"photographs": None, "plan": None, "meanings": MEANINGS}


def _of_scene(given: Path, clips: int | None) -> dict:
    path, *others = (source.path for source in find_sources([given]))
    scene, format, left_out = open_source(path)
    height, width = _size(scene)
    chosen = torch.linspace(0, len(scene) - 1, min(PHOTOGRAPHS, len(scene))).round().long().tolist()
    shown = torch.stack([fit_image(scene.image(view), THUMBNAIL, _beside(scene)) for view in chosen])
    settings = ClipSettings(
        frames=min(SCENE_FRAMES, len(scene)), height=height, width=width, max_stride=4, known_views=2, points="auto",
        clips_per_scene=clips or SCENE_CLIPS, seed=0, radius=point_radius(height, width), half_pixel_shift=False,
        limits=dict.fromkeys(LIMITS, 0.0),
    )  # fmt: skip
    rows, clouds = [], []
    lost = [(f"not posed {name}", reason) for name, reason in left_out.items()]
    lost += [("note", note) for note in scene.notes]
    if others:
        lost.append(
            ("note", f"{path.name} is shown, the first of {len(others) + 1} scenes; give another, as {others[0]}")
        )
    entry, numbers = Source(scene.name, path), range(settings.clips_per_scene)
    with one_thread():
        results = list(scene_clips(entry, numbers, settings)) if settings.frames > 2 else []
    for result in results:
        if isinstance(result, Lost):
            lost += [("no clip", result.reason)] if ("no clip", result.reason) not in lost else []
            continue
        cameras = result.clip.cameras
        kept = torch.linspace(0, len(result.points) - 1, CLOUD_POINTS).long()
        cloud = (result.points[kept], result.colors[kept]) if len(result.points) else (torch.empty(0, 3),) * 2
        clouds.append(cloud)
        angle = _half_angle(cameras.intrinsics, width)
        record = record_of(result)
        moving = film(record.name, {"render": result.clip.render, "truth": result.clip.truth}, record.known)
        plan = plan_view(cameras.world_from_cam, *cloud, angle)
        rows.append(Row(record.name, _clip_facts(record, LIMITS), moving, plan))
    if scene.points is not None and scene.point_colors is not None:
        kept = torch.linspace(0, len(scene.points) - 1, min(4 * CLOUD_POINTS, len(scene.points))).long()
        clouds = [(scene.points[kept], scene.point_colors[kept])]
    points, colors = (torch.cat(part) for part in zip(*clouds, strict=True)) if clouds else (torch.empty(0, 3),) * 2
    distance = pose_distance(scene.cameras, typical_depth(scene))
    nearest = (distance + torch.eye(len(scene)) * 1e9).min(1).values if len(scene) > 1 else torch.zeros(1)
    angle = _half_angle(scene.cameras.intrinsics, scene.cameras.width)
    facts = [
        ("format", format),
        ("photographs", f"{len(scene)}, {_pixels(scene.cameras.height, scene.cameras.width)}"),
        ("field of view", f"{2 * math.degrees(angle):.0f} degrees across"),
        ("lens", "distorted; undone" if scene.lenses is not None else "pinhole"),
        ("sparse points", "none" if scene.points is None else f"{len(scene.points)}, from the scene's own files"),
        ("depth maps", "none" if scene.depth_paths is None else str(len(scene.depth_paths))),
        ("to the nearest view", f"{math.degrees(nearest.median()):.1f} degrees of turn and parallax (median)"),
    ]
    photographs = data_address(sheet_of(shown, 1, {"quality": 80}, min(8, len(shown))))
    plan = plan_view(scene.cameras.world_from_cam, points, colors, angle)
    captions = {"render": ("Render", "what a model would be given"), "truth": ("Truth", "what the camera saw")}
    page = {"title": str(path), "facts": facts, "lost": lost, "rows": rows, "captions": captions}
    page |= {"photographs": photographs, "shown": shown_of(len(shown), len(scene)), "plan": plan}
    return page | {"meanings": MEANINGS}


def plan_view(world_from_cam: Tensor, points: Tensor, colors: Tensor, half_angle: float) -> Plan:
    """Cameras [V, 4, 4] and points [P, 3] with colours [P, 3] in [0, 1], seen from above the cameras.

    Up is against the mean of the cameras' y axes, and the mean viewing direction points up on the page. The farthest
    tenth of the points, seen from the middle of the cameras, is left out: few strays would make all else small.
    """
    poses = world_from_cam.double()
    down = normalize(poses[:, :3, 1].mean(0), dim=0)
    forward = poses[:, :3, 2].mean(0)
    forward = normalize(forward - (forward @ down) * down, dim=0)
    if not forward.any():  # cameras that look in all directions have no mean one
        forward = normalize(poses[0, :3, 2] - (poses[0, :3, 2] @ down) * down, dim=0)
    axes = torch.stack([torch.linalg.cross(down, forward), -forward])  # right, and down on the page
    centers = poses[:, :3, 3]
    middle = centers.mean(0)
    away = (points.double() - middle).norm(dim=-1)
    if len(points):
        near = away <= torch.quantile(away, 0.9)
        points, colors, away = points[near], colors[near], away[near]
    flat_points, flat = (points.double() - middle) @ axes.T, (centers - middle) @ axes.T
    reach = (away.median() if len(points) else (centers - middle).norm(dim=-1).max() + 1e-6) * 0.15
    looks = normalize(poses[:, :3, 2] @ axes.T, dim=-1) * reach
    across = torch.stack([-looks[:, 1], looks[:, 0]], dim=-1) * math.tan(half_angle)
    triangles = torch.stack([flat, flat + looks + across, flat + looks - across], dim=1)
    everything = torch.cat([flat_points, triangles.reshape(-1, 2)])
    low, high = everything.min(0).values, everything.max(0).values
    scale = 96 / (high - low).max().clamp(min=1e-9)

    def place(xy: Tensor) -> list[list[float]]:
        return (50 + (xy - (low + high) / 2) * scale).tolist()

    shades = (colors.clamp(0, 1) * 255).round().long().tolist()
    return Plan(
        points=[
            (x, y, f"#{r:02x}{g:02x}{b:02x}") for (x, y), (r, g, b) in zip(place(flat_points), shades, strict=True)
        ],
        path=_svg(place(flat)),
        cameras=[_svg(place(triangle)) for triangle in triangles],
    )


def _clip_facts(record: ClipRecord, limits: dict[str, float]) -> list[tuple[str, str]]:
    stride = "chosen by pose" if record.stride is None else str(record.stride)
    facts = [("from", record.frames[0]), ("to", record.frames[-1]), ("frames apart", stride)]
    facts.append(("depth from", record.points))
    for key, value in record.figures.items():
        name, unit, _ = MEANINGS.get(key, (key, "", ""))
        limit = limits.get(key, 0)
        asked = f" (below {limit:g}: prepare drops it)" if value < limit else f" (at least {limit:g})" if limit else ""
        facts.append((name, f"{value:.3g}{f' {unit}' if unit else ''}{asked}"))
    return facts


def film(name: str, videos: dict[str, Tensor], known: Sequence[int] = (), columns: int | None = None) -> dict:
    """Videos [F, 3, H, W] of one clip as a page plays them, about `THUMBNAIL` rows high: sheets of frames side by side,
    or ``columns`` a line."""
    frames, _, height, width = next(iter(videos.values())).shape
    columns, shrink = columns or frames, max(1, height // THUMBNAIL)
    sheets = {key: data_address(sheet_of(video, shrink, {"quality": 80}, columns)) for key, video in videos.items()}
    size = {"frames": frames, "columns": columns, "height": height, "width": width}
    return {"name": name, **size, "known": list(known), "sheets": sheets}


def shown_of(shown: int, total: int) -> str:
    """How many of all are on the page."""
    return f"all {total}" if shown == total else f"{shown} of {total}, evenly chosen"


def _pixels(height: int, width: int) -> str:
    """As people say it of photographs; options say HEIGHTxWIDTH."""
    return f"each {width} wide and {height} high"


def _half_angle(intrinsics: Tensor, width: int) -> float:
    return math.atan(width / 2 / intrinsics[0, 0, 0].item())


def _size(scene: Scene) -> tuple[int, int]:
    """Of the clips that are made for the page."""
    return SCENE_ROWS, round(SCENE_ROWS * scene.cameras.width / scene.cameras.height)


def _beside(scene: Scene) -> int:
    """Width of a thumbnail."""
    return max(1, round(THUMBNAIL * scene.cameras.width / scene.cameras.height))


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counter.items()))


def _svg(points: Sequence[Sequence[float]]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
