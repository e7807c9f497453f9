"""Built-in static scenes: a textured room with objects, ray-cast with exact depth and cameras.

World axes: x and y on the floor, z up, metres. Everything follows from (split, seed, index), so training and test
scenes never meet and any scene can be made again without keeping a file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fvgen.clips.clip import Clip, Others, render_clip
from fvgen.clips.textures import PATTERNS, Texture, color_at
from fvgen.clips.worlds import WORLDS, World
from fvgen.geometry.cameras import Cameras, look_at, pinhole, pixel_rays
from fvgen.geometry.off_path import off_path
from fvgen.geometry.pointcloud import unproject
from fvgen.geometry.trajectories import pan

GENERATION = 3  # raise it when a change here alters any clip: cached ones are then made anew
FAR = 1e4
USUAL = WORLDS["builtin"]
SHARP = ("bricks", "checker", "dots", "stripes", "tiles")  # patterns with hard edges that repeat
CLEARANCE = 0.1  # metres that a camera keeps from every object
STRIDE = 0.5  # metres of a path that parts from others
TRIES = 8  # places for every view off a path, before nearer ones are tried
SUPERSAMPLES = ((0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75))


@dataclass(frozen=True)
class Room:
    """The inside of an axis-aligned box; one texture per face in the order -x +x -y +y -z +z."""

    low: Tensor  # [3]
    high: Tensor  # [3]
    textures: tuple[Texture, ...]


@dataclass(frozen=True)
class Solid:
    """A box (turned about z) or an ellipsoid: ``half`` are half-extents or radii in its own frame."""

    shape: str  # "box" | "ellipsoid"
    center: Tensor  # [3]
    half: Tensor  # [3]
    yaw: float
    texture: Texture


@dataclass(frozen=True)
class SyntheticScene:
    """A room, its objects, and a point light that casts shadows."""

    name: str
    room: Room
    solids: tuple[Solid, ...]
    light: Tensor  # [3]
    ambient: float


def scene_generator(split: str, seed: int, index: int) -> torch.Generator:
    """The random stream of one scene: any two of (split, seed, index) differ in theirs."""
    digest = hashlib.sha256(f"fvgen scene {split} {seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def synthetic_clip(
    split: str, seed: int, index: int, frames: int, height: int, width: int, world: World = USUAL, others: int = 0
) -> Clip:
    """Clip ``index`` of a built-in data set: one scene, one path, a thinned and slightly wrong cloud of known frames;
    ``others``: so many views off the path as well, with everybody's depth.

    What is drawn from is the ``world``'s. No two worlds share a scene.
    """
    scene, cameras, generator = drawn_scene(split, seed, index, frames, height, width, world)
    images, depth = render_scene(scene, cameras)
    keep = math.exp(_uniform(generator, *map(math.log, world.keep)))
    depth_noise = _uniform(generator, *world.depth_noise)
    first_alone = world.first_alone > 0 and _uniform(generator, 0.0, 1.0) < world.first_alone
    known = [0] if first_alone else [0, frames - 1]
    clip = depth_clip(
        scene.name, images, depth, cameras, world.radius, keep, depth_noise, generator, known, world.close
    )
    return replace(clip, others=other_views(scene, cameras, others, depth)) if others else clip


def drawn_scene(
    split: str, seed: int, index: int, frames: int, height: int, width: int, world: World = USUAL
) -> tuple[SyntheticScene, Cameras, torch.Generator]:
    """Scene and path of clip ``index``, and the random stream where they leave it. Objects in the way of any path
    through the scene are taken out of it."""
    whole = f"{world.name}-{split}" if world.name else split
    generator = scene_generator(whole, seed, index // world.paths)
    scene = make_scene(generator, f"{whole}-{seed}-{index:05d}", world)
    cameras = make_path(generator, scene, frames, height, width, world)
    if world.paths == 1:
        return clear_the_way(scene, cameras), cameras, generator
    paths = [parting_path(generator, scene, cameras[:1], frames, world) for _ in range(world.paths)]
    for path in paths:
        scene = clear_the_way(scene, path)
    return scene, paths[index % world.paths], generator


def other_views(scene: SyntheticScene, cameras: Cameras, count: int, depth: Tensor) -> Others:
    """``count`` views off the path that are inside the room and keep the clearance; ``depth`` [F, H, W] is the path's.

    They follow from the scene's name: a clip with others is the same clip. Where the room leaves too few places they
    are nearer to the path, or on it.
    """
    generator = scene_generator(f"others of {scene.name}", 0, 0)
    for shift in (0.25, 0.1, 0.0):
        tried = off_path(cameras, TRIES * count, generator, shift, beyond=0.8 * shift)
        free = [view for view, center in enumerate(tried.centers) if is_free(scene, center)]
        if len(free) >= count:
            break
    kept = tried[(free if len(free) >= count else list(range(count)))[:count]]
    images, theirs = render_scene(scene, kept)
    return Others(images, kept, torch.cat([depth, theirs]))


def is_free(scene: SyntheticScene, center: Tensor) -> bool:
    """Whether a camera may be there: inside the room and away from walls and objects by the clearance."""
    inside = (center > scene.room.low + CLEARANCE).all() and (center < scene.room.high - CLEARANCE).all()
    return bool(inside) and not any(_near(solid, center[None]) for solid in scene.solids)


def depth_clip(
    name: str,
    truth: Tensor,
    depth: Tensor,
    cameras: Cameras,
    radius: float,
    keep: float,
    depth_noise: float,
    generator: torch.Generator,
    known: Sequence[int] | None = None,
    close: bool = False,
) -> Clip:
    """A clip whose cloud comes from the depth [F, H, W] of its ``known`` frames, the first and the last one if not
    given (FVGen, section 5.1).

    ``keep`` is the share of points that survive and ``depth_noise`` the relative standard deviation of a smooth
    depth error: the built-in scenes know their depth exactly, an estimator would not.
    """
    known = [0, truth.shape[0] - 1] if known is None else list(known)
    coarse = torch.randn(len(known), 1, 4, 5, generator=generator)
    error = torch.nn.functional.interpolate(coarse, size=depth.shape[1:], mode="bicubic", align_corners=True)[:, 0]
    points, colors = unproject(depth[known] * (1 + depth_noise * error), truth[known], cameras[known])
    chosen = torch.rand(points.shape[0], generator=generator) < keep
    return render_clip(name, truth, cameras, points[chosen], colors[chosen], known, radius, close)[0]


def make_scene(generator: torch.Generator, name: str, world: World = USUAL) -> SyntheticScene:
    """Draw a room of 4 to 7 m with 3 to 7 objects standing on its floor or hanging in the air."""
    half_x, half_y = _uniform(generator, 2.0, 3.5), _uniform(generator, 2.0, 3.5)
    height = _uniform(generator, 2.4, 3.4)
    room = Room(
        low=torch.tensor([-half_x, -half_y, 0.0]),
        high=torch.tensor([half_x, half_y, height]),
        textures=tuple(_texture(generator, 0.6, 2.0, world.sharp) for _ in range(6)),
    )
    solids = tuple(_solid(generator, room, world.sharp) for _ in range(3 + _integer(generator, 5)))
    light = torch.tensor([_uniform(generator, -1.2, 1.2), _uniform(generator, -1.2, 1.2), height * 0.92])
    return SyntheticScene(name, room, solids, light, _uniform(generator, 0.35, 0.6))


def make_path(
    generator: torch.Generator, scene: SyntheticScene, frames: int, height: int, width: int, world: World = USUAL
) -> Cameras:
    """A smooth path of ``frames`` views: camera and look-at point both move, with a slight bow, inside the room."""
    radius = torch.minimum(scene.room.high[0], scene.room.high[1]) * _uniform(generator, 0.7, 0.92)
    start = _uniform(generator, 0, 2 * math.pi)
    sweep = _uniform(generator, *world.sweep) * (1 if _integer(generator, 2) else -1)
    s = torch.linspace(0, 1, frames)
    angle = start + sweep * s
    reach = radius * (1 - _uniform(generator, -0.05, 0.35) * s)
    rise = _uniform(generator, 0.8, 1.7) + _uniform(generator, -0.4, 0.4) * s
    position = torch.stack([reach * angle.cos(), reach * angle.sin(), rise], dim=-1)
    target_a = torch.tensor([_uniform(generator, -0.9, 0.9), _uniform(generator, -0.9, 0.9), 0.9])
    target_b = target_a + torch.tensor([_uniform(generator, -0.6, 0.6) for _ in range(3)]) * torch.tensor([1, 1, 0.4])
    target = torch.lerp(target_a, target_b, s[:, None])
    poses = look_at(position, target, torch.tensor([0.0, 0.0, 1.0]))
    return Cameras(poses, pinhole(frames, height, width, _uniform(generator, 55, 80)), height, width)


def parting_path(
    generator: torch.Generator, scene: SyntheticScene, first: Cameras, frames: int, world: World = USUAL
) -> Cameras:
    """A path from the camera ``first``: straight on in any direction for `STRIDE`, or to where a wall is, while the
    camera turns to either side by a sweep of the world's."""
    turn = _uniform(generator, *world.sweep) * (1 if _integer(generator, 2) else -1)
    turned = pan(first, frames, yaw=math.degrees(turn))
    way = STRIDE * torch.nn.functional.normalize(torch.randn(3, generator=generator), dim=0)
    pose = turned.world_from_cam.float()
    centers = pose[:, :3, 3] + torch.linspace(0, 1, frames)[:, None] * way
    pose[:, :3, 3] = centers.clamp(scene.room.low + CLEARANCE, scene.room.high - CLEARANCE)
    return replace(turned, world_from_cam=pose, intrinsics=turned.intrinsics.float())


def clear_the_way(scene: SyntheticScene, cameras: Cameras) -> SyntheticScene:
    """The scene without objects that hold a camera or come nearer to one than the clearance."""
    return replace(scene, solids=tuple(solid for solid in scene.solids if not _near(solid, cameras.centers)))


def render_scene(scene: SyntheticScene, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Ray-cast: images [V, 3, H, W] in [0, 1] (4 samples a pixel) and depth [V, H, W] of the pixel centres, metres."""
    origins = cameras.centers[:, None, None].expand(-1, cameras.height, cameras.width, -1).reshape(-1, 3)
    shape = (len(cameras), cameras.height, cameras.width)
    color = torch.zeros(origins.shape[0], 3)
    for offset in SUPERSAMPLES:
        color += _shade(scene, origins, pixel_rays(cameras, offset).reshape(-1, 3))
    depth = _nearest(scene, origins, pixel_rays(cameras).reshape(-1, 3))[0]
    images = (color / len(SUPERSAMPLES)).reshape(*shape, 3).permute(0, 3, 1, 2).contiguous()
    return images, depth.reshape(shape)


def _shade(scene: SyntheticScene, origins: Tensor, rays: Tensor) -> Tensor:
    distance, hit = _nearest(scene, origins, rays)
    points = origins + distance[:, None] * rays
    color, normal = torch.zeros_like(points), torch.zeros_like(points)
    for index in range(-1, len(scene.solids)):
        mask = hit == index
        if mask.any():
            surface = _room_surface if index < 0 else _solid_surface
            color[mask], normal[mask] = surface(scene.room if index < 0 else scene.solids[index], points[mask])
    to_light = scene.light - points
    length = to_light.norm(dim=-1, keepdim=True)
    facing = (normal * to_light / length).sum(-1, keepdim=True).clamp(min=0)
    lifted = points + 1e-3 * normal  # off the surface, or it would shadow itself
    blocked = torch.zeros(points.shape[0], dtype=torch.bool)
    for solid in scene.solids:
        blocked |= _hit_solid(solid, lifted, to_light) < 0.99
    lit = torch.where(blocked[:, None], torch.zeros_like(facing), facing) / (1 + 0.08 * length**2)
    return (color * (scene.ambient + (1.35 - scene.ambient) * lit)).clamp(0, 1)


def _nearest(scene: SyntheticScene, origins: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (in units of the ray) [R] to the first surface and its index [R]: -1 is the room."""
    wall = torch.where(_nonzero(rays) > 0, scene.room.high, scene.room.low)
    best = ((wall - origins) / _nonzero(rays)).min(dim=-1).values
    hit = torch.full(best.shape, -1, dtype=torch.long)
    for index, solid in enumerate(scene.solids):
        distance = _hit_solid(solid, origins, rays)
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        hit[nearer] = index
    return best, hit


def _hit_solid(solid: Solid, origins: Tensor, rays: Tensor) -> Tensor:
    """Distance [R] along each ray to where it enters the solid; FAR where it misses."""
    o, d = _to_local(solid, origins - solid.center) / solid.half, _to_local(solid, rays) / solid.half
    if solid.shape == "box":
        safe = _nonzero(d)
        a, b = (-1 - o) / safe, (1 - o) / safe
        enter, leave = torch.minimum(a, b).amax(-1), torch.maximum(a, b).amin(-1)
        hit = (enter < leave) & (enter > 1e-4)
        return torch.where(hit, enter, torch.full_like(enter, FAR))
    a, b, c = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1
    root = b * b - a * c
    enter = (-b - root.clamp(min=0).sqrt()) / a
    return torch.where((root > 0) & (enter > 1e-4), enter, torch.full_like(enter, FAR))


def _near(solid: Solid, points: Tensor) -> bool:
    """Whether any of the points [V, 3] lies in the solid or nearer to it than the clearance."""
    unit = _to_local(solid, points - solid.center).abs() / (solid.half + CLEARANCE)
    return bool(((unit.amax(-1) if solid.shape == "box" else unit.norm(dim=-1)) < 1).any())


def _room_surface(room: Room, points: Tensor) -> tuple[Tensor, Tensor]:
    gap = torch.cat([points - room.low, room.high - points], dim=-1)  # -x -y -z +x +y +z
    face = gap.abs().argmin(-1)
    color, normal = torch.zeros_like(points), torch.zeros_like(points)
    for index in range(6):
        mask = face == index
        axis, far = index % 3, index // 3
        others = [i for i in range(3) if i != axis]
        color[mask] = color_at(room.textures[2 * axis + far], points[mask][:, others] + 50.0)
        normal[mask, axis] = -1.0 if far else 1.0
    return color, normal


def _solid_surface(solid: Solid, points: Tensor) -> tuple[Tensor, Tensor]:
    local = _to_local(solid, points - solid.center)
    unit = local / solid.half
    if solid.shape == "box":
        axis = unit.abs().argmax(-1)
        normal = torch.nn.functional.one_hot(axis, 3).float() * unit.sign()
        u = torch.where(axis == 0, local[:, 1], local[:, 0])
        v = torch.where(axis == 2, local[:, 1], local[:, 2])
        uv = torch.stack([u, v], dim=-1)
    else:
        normal = torch.nn.functional.normalize(unit / solid.half, dim=-1)
        around = torch.atan2(unit[:, 1], unit[:, 0])
        uv = torch.stack([around * solid.half[0], local[:, 2]], dim=-1)
    return color_at(solid.texture, uv + 50.0), _to_world(solid, normal)


def _to_local(solid: Solid, vector: Tensor) -> Tensor:
    return vector @ _yaw_matrix(solid.yaw)


def _to_world(solid: Solid, vector: Tensor) -> Tensor:
    return vector @ _yaw_matrix(solid.yaw).T


def _yaw_matrix(yaw: float) -> Tensor:
    c, s = math.cos(yaw), math.sin(yaw)
    return torch.tensor([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1e-9, torch.full_like(x, 1e-9), x)


def _solid(generator: torch.Generator, room: Room, sharp: bool) -> Solid:
    shape = "box" if _integer(generator, 3) else "ellipsoid"
    half = torch.tensor([_uniform(generator, 0.18, 0.55) for _ in range(3)])
    limit = 0.55 * room.high
    center = torch.tensor([_uniform(generator, -limit[i].item(), limit[i].item()) for i in range(2)] + [0.0])
    floating = _integer(generator, 4) == 0
    center[2] = _uniform(generator, 1.0, 1.8) if floating else half[2].item()
    return Solid(shape, center, half, _uniform(generator, 0, math.pi), _texture(generator, 0.25, 0.8, sharp))


def _texture(generator: torch.Generator, smallest: float, largest: float, sharp: bool) -> Texture:
    """Two colours of one hue family, far enough apart in brightness that the pattern shows; ``sharp``: far apart."""
    names = SHARP if sharp else sorted(PATTERNS)
    base = torch.rand(3, generator=generator) * 0.75 + 0.2
    contrast = (0.1, 0.35) if sharp else (0.25, 0.75)
    other = (base * _uniform(generator, *contrast) + 0.12 * torch.rand(3, generator=generator)).clamp(0, 1)
    colors = torch.stack([other, base] if _integer(generator, 2) else [base, other])
    return Texture(
        pattern=names[_integer(generator, len(names))],
        scale=_uniform(generator, smallest, largest),
        colors=colors,
        grain=_uniform(generator, *((0.0, 0.1) if sharp else (0.1, 0.9))),
        seed=_wide_integer(generator) % (1 << 30),
    )


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _integer(generator: torch.Generator, limit: int) -> int:
    return int(torch.randint(limit, (), generator=generator).item())


def _wide_integer(generator: torch.Generator) -> int:
    """64 random bits. `torch.randint` with a limit above 2^28 draws 32 or 64 of them, depending on torch's version."""
    return torch.empty((), dtype=torch.int64).random_(-(2**63), None, generator=generator).item() % 2**64
