"""run.html: what was given, the path and the cloud from above, renders and video, on one page."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from fvgen.geometry.pointcloud import unproject
from fvgen.reports.contact_sheet import PHOTOGRAPHS, Row, film, plan_view, shown_of
from fvgen.reports.page import data_address, page_template, sheet_of
from fvgen.system.files import atomic_path, write_text
from fvgen.walks.render import Cloud, Rendered

FILM = 16  # frames shown
POINTS = 1500


def write_page(out: Path, title: str, facts: list[tuple[str, str]], left_out: dict[str, str], parts: Parts) -> None:
    """The page of a walk at ``out``."""
    cloud, rendered, video = parts
    points, colors = unproject(cloud.depth, cloud.photographs, cloud.cameras)
    kept = torch.linspace(0, len(points) - 1, min(POINTS, len(points))).long()
    angle = math.atan(cloud.cameras.width / 2 / cloud.cameras.intrinsics[0, 0, 0].item())
    plan = plan_view(rendered.cameras.world_from_cam, points[kept], colors[kept], angle)
    shown = torch.linspace(0, len(video) - 1, min(FILM, len(video))).round().long()
    moving = film("walk", {"render": rendered.frames[shown], "video": video[shown]}, columns=min(8, len(shown)))
    coverage = rendered.coverage
    about = [
        ("coverage", f"{coverage.min():.0%} to {coverage.max():.0%}"),
        ("frames shown", shown_of(len(shown), len(video))),
    ]
    photographs = cloud.photographs[:PHOTOGRAPHS]
    page = {
        "title": title,
        "facts": facts,
        "lost": [(f"left out {name}", reason) for name, reason in left_out.items()],
        "rows": [Row("walk", about, moving, plan)],
        "captions": {"render": ("Render", "what the model was given"), "video": ("Video", "what it made of it")},
        "shown": shown_of(len(photographs), len(cloud.photographs)),
        "meanings": {},
        "photographs": data_address(sheet_of(photographs, 1, {"quality": 80}, min(8, len(photographs)))),
        "plan": plan_view(cloud.cameras.world_from_cam, points[kept], colors[kept], angle),
    }
    with atomic_path(out) as temporary:
        write_text(temporary, page_template("contact_sheet.html.jinja").render(**page))


Parts = tuple[Cloud, Rendered, Tensor]  # the video [F, 3, H, W]
