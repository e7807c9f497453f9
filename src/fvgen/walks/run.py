"""`fvgen generate`: from photographs to a folder with video, renders, points and a data set; run again to resume."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fvgen
from fvgen.clips.clip import to_bytes
from fvgen.depth.maps import judge_source
from fvgen.errors import UserError, did_you_mean
from fvgen.geometry.cameras import Cameras
from fvgen.pipelines.base import NovelViewPipeline
from fvgen.pipelines.folders import check_device, load_pipeline
from fvgen.pipelines.hub import find_model
from fvgen.scenes.images import fit_image
from fvgen.shards.encoders import RenderNeeds, render_needs
from fvgen.splats import feedforward
from fvgen.system.doors import load_tensors, read_json
from fvgen.system.files import locked, new_folder, remove, writable_folder, write_json, write_tensors
from fvgen.system.places import sha256_of
from fvgen.walks.chain import SEAM, SEAMS, Made, chain, walk_spans
from fvgen.walks.dataset import View, save_png, write_dataset, write_views
from fvgen.walks.film import judge_film, write_film
from fvgen.walks.given import Given, hold_out, judge, lacks_depth, open_given
from fvgen.walks.judged import judge_clips, judge_guided
from fvgen.walks.page import write_page
from fvgen.walks.paths import Walk, camera_path, default_trajectory, judge_trajectory, said
from fvgen.walks.render import Cloud, Rendered, judge_coverage, judge_start, make_cloud, render_walk

FPS = 10
VIEWS = 5  # photographs that the path visits and the points come from, as FVGen's, unless told otherwise
WORK = "work"  # in the output folder while it is made
Told = Callable[[str], None]
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Choices:
    """All that decides a walk beside the photographs: see `generate`."""

    model: str
    trajectory: str | None
    frames: int | None
    steps: int | None
    size: tuple[int, int] | None
    seed: int
    points: str
    views: int
    seams: str
    dataparser_transforms: str | None
    holdout: int = 0


@dataclass(frozen=True)
class Plan:
    """What is known before the model runs."""

    given: Given
    cloud: Cloud
    walk: Walk
    rendered: Rendered
    warning: str | None
    held: list[int]


def generate(
    photographs: str | Path | Sequence[str | Path],
    out: str | Path,
    model: str | Path = "tiny",
    trajectory: str | Path | None = None,
    frames: int | None = None,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    points: str = "auto",
    views: int = VIEWS,
    seams: str = SEAM,
    scene: bool = False,
    holdout: int = 0,
    dataparser_transforms: str | Path | None = None,
    device: str = "cpu",
    told: Told = lambda line: None,
    on_progress: OnProgress = lambda done, total: None,
    on_fit: OnProgress = lambda done, total: None,
) -> Path:
    """Photographs to a walk-through in the folder ``out``, which is returned; the same call again resumes.

    Args:
        photographs: 1 to 50 of them, a folder of them, a video, or a posed scene.
        model: a preset, a model folder, or ORGANISATION/NAME on the Hub; teacher or student.
        trajectory: "through" the photographs, "orbit", "spiral", "dolly" or "pan" from the first (with an amount:
            "orbit:30"), or a file or folder of cameras (docs/generate.md); by default through two or more, round one.
        frames: of the walk; None: a clip from photograph to photograph, or as many as a file has.
        steps: of the model's sampler; its own if None. size: height and width; the model's own if None.
        points: where depth comes from, see `fvgen.depth.maps.point_maps`.
        views: how many photographs, evenly chosen, give points and are visited; the others join the data set only.
        seams: how clips are chained, see `fvgen.walks.chain.chain`.
        scene: fit 3D Gaussians at the end.
        holdout: so many photographs are posed and given nowhere; they go to ``holdout`` beside the data set, where
            `fvgen.splats.reconstruct` finds them to score the scene on.
        dataparser_transforms: nerfstudio's file, for a path of its viewer; the one beside the path is found.
        told, on_progress, on_fit: are given lines for the user, clips done of all, and iterations of the fit.

    Raises UserError (one sentence, nothing written) for anything wrong with these.
    """
    paths = [photographs] if isinstance(photographs, str | Path) else list(photographs)
    choices = Choices(
        str(model), None if trajectory is None else str(trajectory), frames, steps, size, seed, points, views, seams,
        None if dataparser_transforms is None else str(dataparser_transforms), holdout,
    )  # fmt: skip
    out, seconds = Path(out), {}
    judge_choices(paths, choices, device)
    judge_film()
    with _timed(seconds, "model"):
        pipeline = load_walker(choices.model, device)
        needs = walk_needs(pipeline, choices)
        choices = with_scale(choices, pipeline, paths)
    settings = _settings(paths, out, choices, pipeline, needs)
    if _finished(out, settings):
        if scene and not (out / "scene.json").is_file():
            make_scene(out, pipeline, needs, told, on_fit)
        told(f"{out} is complete")
        return out
    plan = plan_walk(paths, choices, needs, told, seconds, pipeline.wants_cameras)
    if plan.warning:
        told(f"warning: {plan.warning}")
    judge_walk(pipeline, plan, needs, choices.seams)
    writable_folder(out / WORK)
    with locked(out / WORK / "lock"):
        write_json(out / WORK / "settings.json", settings)
        with _timed(seconds, "generate"):
            video, latents = _video(pipeline, plan, choices, needs, out / WORK, on_progress)
        with _timed(seconds, "write"):
            if latents:
                feedforward.keep(out, latents)
            _write(out, plan, video, settings)
    remove(out / WORK)
    if scene:
        with _timed(seconds, "scene"):
            make_scene(out, pipeline, needs, told, on_fit)
    told("seconds: " + ", ".join(f"{stage} {spent:.1f}" for stage, spent in seconds.items()))
    return out


def make_scene(out: Path, pipeline: NovelViewPipeline, needs: RenderNeeds, told: Told, on_fit: OnProgress) -> None:
    """3D Gaussians of a finished walk: from its latents in one pass where the model has a LaLRM, else fitted to its
    views. The one place where walks and splats meet."""
    if pipeline.lalrm is not None:
        feedforward.write_scene(out, pipeline.lalrm, needs.height, needs.width, told)
        return
    from fvgen.splats import reconstruct

    reconstruct(out, device=str(pipeline.device), told=told, on_step=on_fit)


# --- Judging ---


def judge_choices(paths: list[str | Path], choices: Choices, device: str) -> None:
    """Raises UserError for what can be told without opening model or photographs."""
    judge(paths)
    if choices.trajectory is not None:
        judge_trajectory(choices.trajectory)
    for name, value in (("frames", choices.frames), ("steps", choices.steps)):
        least = 2 if name == "frames" else 1
        if value is not None and not least <= value <= 1000:
            raise UserError(f"--{name} {value} is not possible; give {least} to 1000")
    if choices.views < 1:
        raise UserError(f"--views {choices.views} is not possible; give 1 or more")
    if choices.holdout < 0:
        raise UserError(f"--holdout {choices.holdout} is not possible; give 0 or more")
    if choices.seams not in SEAMS:
        raise UserError(f"unknown way to chain clips {choices.seams!r}{did_you_mean(choices.seams, SEAMS)}")
    judge_source(choices.points)
    check_device(device)


def load_walker(model: str, device: str = "cpu") -> NovelViewPipeline:
    """A teacher or student, on the device, without progress bars of its own."""
    pipeline = load_pipeline(find_model(model), NovelViewPipeline).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def walk_needs(pipeline: NovelViewPipeline, choices: Choices) -> RenderNeeds:
    """Frames of a clip and their size. Raises UserError for those that the model cannot take."""
    clip = pipeline.frames if choices.frames is None else min(choices.frames, pipeline.frames)
    needs = render_needs(pipeline, clip, choices.size, None)
    if needs.height % 2 or needs.width % 2:
        raise UserError(f"size {needs.height}x{needs.width} has odd numbers, which videos cannot have; give even ones")
    return needs


def with_scale(choices: Choices, pipeline: NovelViewPipeline, paths: Sequence[str | Path]) -> Choices:
    """For a model that is guided by cameras one photograph is enough, without a depth of its own: a wall at distance 1
    says how long a path is."""
    if pipeline.wants_cameras and choices.points == "auto" and lacks_depth(paths):
        return replace(choices, points="flat")
    return choices


def _settings(
    paths: list, out: Path, choices: Choices, pipeline: NovelViewPipeline, needs: RenderNeeds
) -> dict[str, Any]:
    """What run.json says: all that is needed to repeat the run."""
    files = [file for path in map(Path, paths) for file in _files(path, out.resolve())]
    size = {"size": [needs.height, needs.width], "clip": needs.frames, "half_pixel_shift": needs.half_pixel_shift}
    chosen = {name: getattr(choices, name) for name in Choices.__dataclass_fields__ if name != "size"}
    named = [Path(x) for x in (choices.trajectory, choices.dataparser_transforms) if x and Path(x).is_file()]
    return {
        "fvgen": fvgen.__version__,
        "torch": torch.__version__,
        "photographs": [str(path) for path in paths],
        "files": {str(file): sha256_of(file) for file in [*files, *named]},
        "encoder": pipeline.encoder_fingerprint(),
        "kind": type(pipeline).__name__,
        "weights": _fingerprint(pipeline),
        "device": str(pipeline.device.type),
        **chosen,
        **size,
    }


def _files(path: Path, out: Path) -> list[Path]:
    """The file, or those of a folder, without what the run itself writes."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and out not in file.resolve().parents)


def _fingerprint(pipeline: NovelViewPipeline) -> list[float]:
    """Sum and sum of squares of the weights of the network, and of the LaLRM where there is one."""
    parts = [part for part in (pipeline.network, pipeline.lalrm) if part is not None]
    weights = [x.detach().double() for part in parts for x in part.parameters()]
    return [sum(x.sum().item() for x in weights), sum(x.square().sum().item() for x in weights)]


def _finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether this very run is there already. Raises UserError where another one, or anything else, is."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise UserError(f"--out {out} is a file; choose a folder")
    for file, whole in ((out / WORK / "settings.json", False), (out / "run.json", True)):
        if file.exists():
            found = read_json(file)
            found = {key: found.get(key) for key in settings} if isinstance(found, dict) else {}
            if different := [key for key in settings if found.get(key) != settings[key]]:
                raise UserError(f"--out {out} holds another run ({different[0]} differs); choose another folder")
            return whole
    if any(out.iterdir()):
        raise UserError(f"--out {out} holds something other than a run of fvgen generate; choose another folder")
    return False


def judge_walk(pipeline: NovelViewPipeline, plan: Plan, needs: RenderNeeds, seams: str) -> None:
    """Raises UserError for a path that the model cannot follow."""
    spans = walk_spans(plan.rendered.known, needs.frames, seams)
    judge_clips(pipeline, spans, needs.height, needs.width)
    if pipeline.wants_cameras:
        judge_guided(plan.walk.cameras, plan.cloud, spans)


# --- Stages ---


def plan_walk(
    paths: list,
    choices: Choices,
    needs: RenderNeeds,
    told: Told,
    seconds: dict[str, float],
    guided: bool = False,
) -> Plan:
    """Poses, points, path and renders. ``guided``: the model looks at cameras, and frames may show no point."""
    with _timed(seconds, "pose"):
        given, held = open_given(paths, choices.points), []
        if choices.holdout:
            given, held = hold_out(given, choices.holdout)
        told(f"{len(given.order)} photographs, {given.format}")
        for name, reason in given.left_out.items():
            told(f"left out {name}: {reason}")
    with _timed(seconds, "points"):
        views = _evenly(given.order, choices.views)
        if len(views) < len(given.order):
            told(f"{len(views)} of {len(given.order)} photographs give points and are visited (--views)")
        cloud = make_cloud(given.scene, views, needs.height, needs.width, choices.points)
        told(f"points: {cloud.backend}, {cloud.filled:.0%} of the depth interpolated")
    with _timed(seconds, "render"):
        trajectory = choices.trajectory or default_trajectory(len(views))
        cameras = given.scene.cameras.fitted(needs.height, needs.width)
        walk = camera_path(
            trajectory, cameras, views, choices.frames, needs.frames, cloud.typical, choices.dataparser_transforms
        )
        told(said(walk, [path.name for path in given.scene.image_paths]))
        rendered = render_walk(cloud, walk, needs.half_pixel_shift, close=needs.closed)
    warning = judge_start(rendered) if guided else judge_coverage(rendered)
    return Plan(given, cloud, walk, rendered, warning, held)


def _evenly(order: list[int], count: int) -> list[int]:
    if count >= len(order):
        return list(order)
    return [order[round(k * (len(order) - 1) / max(1, count - 1))] for k in range(count)]


def _video(
    pipeline: NovelViewPipeline, plan: Plan, choices: Choices, needs: RenderNeeds, work: Path, on_progress: OnProgress
) -> tuple[Tensor, list[feedforward.Latent]]:
    """[F, 3, H, W], and the clips' latents where the model makes scenes of them; clips that an earlier call made are
    read."""
    spans, latents = walk_spans(plan.rendered.known, needs.frames, choices.seams), []

    def kept(number: int, make: Callable[[], Made]) -> Made:
        file = work / f"clip-{number:03d}.safetensors"
        try:
            clip = Made(**load_tensors(file))
        except (UserError, TypeError):  # not there yet
            clip = make()
            write_tensors(file, {name: x for name, x in clip._asdict().items() if x is not None})
        if clip.latents is not None:
            latents.append(feedforward.Latent(clip.latents, plan.rendered.cameras[slice(*spans[number])]))
        on_progress(number + 1, len(spans))
        return clip

    def again(extra: tuple[Tensor, Tensor]) -> Rendered:
        return render_walk(plan.cloud, plan.walk, needs.half_pixel_shift, extra, needs.closed)

    chosen = (needs.frames, choices.steps, choices.seed, choices.seams)
    return chain(pipeline, plan.rendered, *chosen, render_again=again, kept=kept), latents


def _write(out: Path, plan: Plan, video: Tensor, settings: dict[str, Any]) -> None:
    """Everything; run.json last, which says that all is there."""
    given, cloud, rendered, walk = plan.given, plan.cloud, plan.rendered, plan.walk
    height, width = video.shape[2:]
    new_folder(out / "frames")
    for number, frame in enumerate(video):
        save_png(out / "frames" / f"{number:05d}.png", frame)
    write_film(out / "video.mp4", video, FPS)
    write_film(out / "render.mp4", rendered.frames, FPS)

    photographs = [fit_image(given.scene.image(view), height, width) for view in given.order]
    views = [View(f"given_{i:03d}.png", image, False) for i, image in enumerate(photographs)]
    novel = [frame for frame in range(len(video)) if frame not in walk.known]
    views += [View(f"frame_{frame:05d}.png", video[frame], True) for frame in novel]
    fitted = given.scene.cameras.fitted(height, width)[given.order].to(dtype=torch.float64)
    cameras = Cameras(
        torch.cat([fitted.world_from_cam, walk.cameras.world_from_cam[novel]]),
        torch.cat([fitted.intrinsics, walk.cameras.intrinsics[novel]]),
        height,
        width,
    )
    write_dataset(out, views, cameras, cloud, [given.order.index(view) for view in cloud.views])
    if plan.held:
        shown = [fit_image(given.scene.image(view), height, width) for view in plan.held]
        unseen = [View(f"held_{i:03d}.png", image, False) for i, image in enumerate(shown)]
        write_views(out / "holdout", unseen, given.scene.cameras.fitted(height, width)[plan.held])
    result = {
        "format": given.format,
        "left_out": given.left_out,
        "given": {view.name: given.scene.image_paths[n].name for view, n in zip(views, given.order, strict=False)},
        "points": cloud.backend,
        "filled": cloud.filled,
        "known": {str(frame): f"given_{given.order.index(view):03d}.png" for frame, view in walk.known.items()},
        "coverage": [round(value, 4) for value in rendered.coverage.tolist()],
        "warning": plan.warning,
    }
    facts = [
        ("photographs", f"{len(given.order)}, {given.format}"),
        ("model", f"{settings['model']} ({settings['kind']}), steps {settings['steps'] or 'its own'}"),
        ("path", said(walk, [path.name for path in given.scene.image_paths])),
        ("points from", f"{cloud.backend}, {cloud.filled:.0%} of the depth interpolated"),
        *([("warning", plan.warning)] if plan.warning else []),
    ]
    write_page(out / "run.html", out.resolve().name, facts, given.left_out, (cloud, rendered, video))
    frames = {"frames": {f"{n:05d}.png": _digest(frame) for n, frame in enumerate(video)}}
    write_json(out / "run.json", settings | {"result": result | frames})


def _digest(frame: Tensor) -> str:
    import hashlib

    return hashlib.sha256(to_bytes(frame).numpy().tobytes()).hexdigest()[:16]


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def say(line: str) -> None:
    """For `told`: to stderr."""
    print(f"fvgen: {line}", file=sys.stderr)
