"""Pieces of the page, as HTML. Whatever came from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#intro h1 { margin: 0; font-size: 1.5rem; }
#intro p { margin: .2rem 0 0; color: var(--body-text-color-subdued); }
.fv-status { min-height: 3.2rem; }
.fv-status b { font-weight: 600; }
.fv-status ul { margin: .3rem 0 0; padding-left: 1.1rem; color: var(--body-text-color-subdued); font-size: .875rem;
  overflow-wrap: anywhere; }
.fv-status progress { display: block; width: 100%; height: .6rem; margin: .5rem 0; accent-color: #f97316; }
.fv-refused { border-left: 3px solid #dc2626; padding-left: .7rem; overflow-wrap: anywhere; }
.fv-kinds { margin: 0; color: var(--body-text-color-subdued); font-size: .8125rem; }
.fv-box h2 { margin: 1.2rem 0 .4rem; font-size: 1.05rem; }
.fv-box h2:first-child { margin-top: 0; }
.fv-status li { margin: .15rem 0; line-height: 1.35; }
.fv-box iframe { display: block; width: 100%; height: min(76vh, 36rem); border: 0; border-radius: 8px; }
.fv-box p { margin: .5rem 0 0; color: var(--body-text-color-subdued); font-size: .875rem; }
.fv-box video { display: block; width: min(100%, 20rem); margin: .6rem 0 0; border-radius: 8px; background: #000; }
.fv-links { display: flex; flex-wrap: wrap; gap: .6rem; margin: .8rem 0 0; }
.fv-links a { padding: .45rem .9rem; border: 1px solid var(--border-color-primary); border-radius: 8px;
  text-decoration: none; color: inherit; }
.fv-links a:first-child { background: #ea580c; border-color: #ea580c; color: #fff; font-weight: 600; }
@media (max-width: 640px) { .fv-box iframe { height: calc(75vw + 9rem); } }
"""

INTRO = """<h1>Photographs to a walk-through</h1>
<p>Drop photographs that overlap, look at what they give and where the camera will go, then let a model fill it in.
Everything stays on the machine that runs this page, and is deleted when you close it.</p>"""


def kinds(most: int) -> str:
    """Which files may be dropped."""
    return f'<p class="fv-kinds">JPEG, PNG, WebP or HEIC, of at most {most >> 20} MB each.</p>'


def told(state: str, lines: Sequence[str] = (), done: int = 0, total: int = 0) -> str:
    """How far it is: a state, a bar where ``total`` is known, what the job said."""
    bar = f'<progress max="{total}" value="{done}"></progress>' if total else ""
    return f'<div class="fv-status" role="status"><b>{escape(state)}</b>{bar}{_list(lines)}</div>'


def refused(sentence: str, lines: Sequence[str] = ()) -> str:
    """What is wrong, and what to do."""
    whole = escape(sentence[:1].upper() + sentence[1:])
    return f'<div class="fv-status" role="alert"><div class="fv-refused">{whole}.</div>{_list(lines)}</div>'


def _list(lines: Sequence[str]) -> str:
    said = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{said}</ul>" if said else ""


def looked(base: str, mark: str) -> str:
    """The cloud and the path; ``mark`` makes a new address of the same file."""
    return (
        '<div class="fv-box"><h2>Points, cameras and path</h2>'
        f'<iframe title="points, cameras and path in 3D" src="{base}/look/look.html?{mark}"></iframe>'
        "<p>What the model will be given along the path; black is what no photograph shows:</p>"
        f'<video src="{base}/look/render.mp4?{mark}" autoplay loop muted playsinline controls></video></div>'
    )


def made(base: str, folder: str, models: Sequence[str], scenes: Sequence[str], size: int) -> str:
    """Films to compare, scenes to turn, and all of it as one file of ``size`` bytes."""
    place = f"{base}/{folder}"
    splats = "".join(
        f"<h2>3D scene{f' of the {name}' if len(models) > 1 else ''}</h2>"
        f'<iframe title="3D scene" src="{place}/{name}/scene.html"></iframe>'
        for name in scenes
    )
    films = "".join(f'<a href="{place}/{name}/video.mp4" download="{name}.mp4">{name}.mp4</a>' for name in models)
    pages = "".join(f'<a href="{place}/{name}/run.html" target="_blank">report of the {name}</a>' for name in models)
    zipped = f'<a href="{place}/walk.zip" download="walk.zip">Download everything ({size / 1e6:.1f} MB)</a>'
    return (
        '<div class="fv-box"><h2>The walk</h2>'
        f'<iframe title="render, student and teacher side by side" src="{place}/compare.html"></iframe>'
        f'<div class="fv-links">{zipped}{films}{pages}</div>{splats}</div>'
    )
