"""The short way from Python: `open_scene` and `walk`, which write nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fvgen.geometry.cameras import Cameras
from fvgen.scenes.scene import Scene
from fvgen.walks.chain import SEAM, chain
from fvgen.walks.given import Given, open_given
from fvgen.walks.paths import Walk, camera_path, default_trajectory
from fvgen.walks.render import Rendered, make_cloud, render_walk
from fvgen.walks.run import (
    VIEWS,
    Choices,
    _evenly,
    judge_choices,
    judge_walk,
    load_walker,
    plan_walk,
    walk_needs,
    with_scale,
)

SIZE = (320, 512)


@dataclass(frozen=True)
class OpenScene:
    """Photographs with poses, ready to be rendered."""

    given: Given

    @property
    def scene(self) -> Scene:
        return self.given.scene

    def render(
        self,
        path: str | Path | Cameras | None = None,
        size: tuple[int, int] = SIZE,
        frames: int | None = None,
        points: str = "auto",
        views: int = VIEWS,
    ) -> Rendered:
        """What the points of the photographs show along a path: `fvgen.walks.run.generate` explains the arguments.

        ``path`` may also be `Cameras`, which are fitted to the size. Raises UserError for a path that there is not, and
        where no depth can be had.
        """
        chosen = _evenly(self.given.order, views)
        cloud = make_cloud(self.scene, chosen, *size, points)
        if isinstance(path, Cameras):
            return render_walk(cloud, Walk(path.fitted(*size), {}))
        words = default_trajectory(len(chosen)) if path is None else str(path)
        cameras = self.scene.cameras.fitted(*size)
        return render_walk(cloud, camera_path(words, cameras, chosen, frames, 16, cloud.typical))


def open_scene(path: str | Path | Sequence[str | Path], points: str = "auto") -> OpenScene:
    """A posed scene, a folder of photographs, a video, or photographs; those without poses are posed, which is kept.

    Raises UserError for anything wrong with them.
    """
    return OpenScene(open_given([path] if isinstance(path, str | Path) else list(path), points))


def walk(
    photographs: str | Path | Sequence[str | Path],
    path: str | Path | None = None,
    model: str | Path = "tiny",
    frames: int | None = None,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Tensor:
    """The video [F, 3, H, W] in [0, 1] of a walk: `fvgen.walks.run.generate` explains the arguments."""
    paths = [photographs] if isinstance(photographs, str | Path) else list(photographs)
    words = None if path is None else str(path)
    choices = Choices(str(model), words, frames, steps, size, seed, "auto", VIEWS, SEAM, None)
    judge_choices(paths, choices, device)
    pipeline = load_walker(choices.model, device)
    needs = walk_needs(pipeline, choices)
    choices = with_scale(choices, pipeline, paths)
    plan = plan_walk(paths, choices, needs, lambda line: None, {}, pipeline.wants_cameras)
    judge_walk(pipeline, plan, needs, SEAM)
    return chain(pipeline, plan.rendered, needs.frames, steps, seed)
