"""Two photographs to a walk-through: `python examples/01_walk.py [PHOTOGRAPH PHOTOGRAPH ...]`."""

import sys
from pathlib import Path

import fvgen

OUT = Path("runs/examples")


def two_photographs() -> list[Path]:
    """Two pictures of a built-in room, 60 cm apart, for those who have none at hand."""
    import torch
    from PIL import Image

    from fvgen.clips.rooms import make_scene, render_scene, scene_generator
    from fvgen.geometry.cameras import Cameras, look_at, pinhole

    places = torch.tensor([[-1.6, -0.9, 1.4], [-1.2, -1.25, 1.5]])
    looks_at = torch.tensor([[0.8, 0.9, 1.0], [0.9, 0.8, 1.0]])
    poses = look_at(places, looks_at, torch.tensor([0.0, 0.0, 1.0]))
    cameras = Cameras(poses, pinhole(2, 240, 320, 64), 240, 320)
    images, _ = render_scene(make_scene(scene_generator("test", 0, 3), "room"), cameras)
    files = [OUT / "photographs" / name for name in ("one.png", "two.png")]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    for file, image in zip(files, images, strict=True):
        Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()).save(file)
    return files


photographs = sys.argv[1:] or two_photographs()

# What the points of the photographs show along a path, before any model sees it.
rendered = fvgen.open_scene(photographs).render("orbit:15", size=(48, 64), frames=8)
print(f"{len(rendered.frames)} renders, {rendered.coverage.mean():.0%} of their pixels covered")

# The whole: poses, points, renders, video, and a data set of all views. The same call again resumes.
walk = fvgen.generate(photographs, OUT / "walk", trajectory="through", steps=4, told=print)
print(f"{walk / 'video.mp4'}, {walk / 'run.html'}, and for other programs {walk / 'transforms.json'}")
