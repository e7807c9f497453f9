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

from fvgen.clips.filters import LIMITS
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
    """A clip on the page: facts as (name, text), films as (name, image), a picture from above."""

    name: str
    facts: list[tuple[str, str]]
    films: list[tuple[str, str]]
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
        films = [("render, decoded", _film(render)), ("truth, decoded", _film(truth))]
        colors = clip.cloud_colors.float() / 255
        plan = plan_view(clip.world_from_cam, clip.cloud_points, colors, _half_angle(clip.intrinsics, shards.width))
        rows.append(Row(record.name, _clip_facts(record, shards.settings.limits), films, plan))
        latents.append(clip.latents)
    values, settings = torch.stack(latents), shards.settings
    strides = Counter("by pose" if record.stride is None else str(record.stride) for record in shards.records)
    facts = [
        ("clips", str(len(shards))),
        ("scenes", str(len({record.scene for record in shards.records}))),
        ("frames", f"{settings.frames} of {settings.height}x{settings.width}"),
        ("shards", f"{len(shards.shards)}, {sum(shard.bytes for shard in shards.shards) / 2**20:.1f} MB"),
        ("strides", _counts(strides)),
        ("points from", _counts(Counter(record.points for record in shards.records))),
        ("encoder", f"{settings.teacher} ({settings.encoder})"),
        ("latents shown", f"mean {values.mean():.3f}, deviation {values.std():.3f}"),
    ]
    for key in LIMITS:
        figures = torch.tensor([record.figures[key] for record in shards.records])
        facts.append((key, f"{figures.min():.3g} to {figures.max():.3g}, median {figures.median():.3g}"))
    lost = [(f"dropped {count}", reason) for reason, count in shards.dropped().items()]
    lost += [(f"skipped {entry.name}", entry.reason) for entry in shards.skipped()]
    return {"title": str(path), "facts": facts, "lost": lost, "rows": rows, "photographs": None, "plan": None}


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
        films = [("render", _film(result.clip.render)), ("truth", _film(result.clip.truth))]
        plan = plan_view(cameras.world_from_cam, *cloud, angle)
        rows.append(Row(result.clip.name, _clip_facts(record_of(result), LIMITS), films, plan))
    if scene.points is not None and scene.point_colors is not None:
        kept = torch.linspace(0, len(scene.points) - 1, min(4 * CLOUD_POINTS, len(scene.points))).long()
        clouds = [(scene.points[kept], scene.point_colors[kept])]
    points, colors = (torch.cat(part) for part in zip(*clouds, strict=True)) if clouds else (torch.empty(0, 3),) * 2
    distance = pose_distance(scene.cameras, typical_depth(scene))
    nearest = (distance + torch.eye(len(scene)) * 1e9).min(1).values if len(scene) > 1 else torch.zeros(1)
    angle = _half_angle(scene.cameras.intrinsics, scene.cameras.width)
    facts = [
        ("format", format),
        ("photographs", f"{len(scene)} of {scene.cameras.height}x{scene.cameras.width}"),
        ("field of view", f"{2 * math.degrees(angle):.0f} degrees across"),
        ("lens", "distorted; undone" if scene.lenses is not None else "pinhole"),
        ("points", "none" if scene.points is None else str(len(scene.points))),
        ("depth maps", "none" if scene.depth_paths is None else str(len(scene.depth_paths))),
        ("to the nearest view", f"{math.degrees(nearest.median()):.1f} degrees of turn and parallax (median)"),
    ]
    photographs = data_address(sheet_of(shown, 1, {"quality": 80}, min(8, len(shown))))
    plan = plan_view(scene.cameras.world_from_cam, points, colors, angle)
    page = {"title": str(path), "facts": facts, "lost": lost, "rows": rows}
    return page | {"photographs": photographs, "plan": plan}


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
    stride = "by pose" if record.stride is None else str(record.stride)
    facts = [("stride", stride), ("points from", record.points), ("from", record.frames[0]), ("to", record.frames[-1])]
    for key, value in record.figures.items():
        low = f" (below {limits[key]:g})" if key in limits and value < limits[key] else ""
        facts.append((key, f"{value:.3g}{low}"))
    return facts


def _film(video: Tensor) -> str:
    """All frames [F, 3, H, W] side by side."""
    return data_address(sheet_of(video, max(1, video.shape[2] // THUMBNAIL), {"quality": 80}, len(video)))


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
