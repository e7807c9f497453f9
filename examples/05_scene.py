"""A 3D scene: Gaussians fitted to given and generated views, and a picture from where nobody stood.

python examples/05_scene.py [DATA SET]    # the walk of 01_walk.py, or any posed scene with points
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from PIL import Image

from fvgen.geometry.gaussians import render_gaussians
from fvgen.scenes.formats import read_scene
from fvgen.splats import FitSettings, read_splat, reconstruct

OUT = Path("runs/examples")

dataset = Path(sys.argv[1]) if sys.argv[1:] else OUT / "walk"
if not dataset.is_dir():
    sys.exit(f"{dataset} is not here; run examples/01_walk.py first, or name a posed scene")

folder = reconstruct(dataset, OUT / "scene", FitSettings(iterations=60), told=print)
facts = json.loads((folder / "scene.json").read_text())
print(f"{facts['gaussians']} Gaussians; {folder / 'scene.html'} shows them, other viewers read {folder / 'scene.ply'}")

# As the first camera looks, from a step beside its path.
cameras = read_scene(dataset).cameras.fitted(96, 128)
pose, step = cameras.world_from_cam[:1].clone(), cameras.world_from_cam[1, :3, 3] - cameras.world_from_cam[0, :3, 3]
pose[0, :3, 3] += step.norm() * pose[0, :3, 1]  # the camera's y axis points down
image, alpha, depth = render_gaussians(read_splat(folder / "scene.ply"), replace(cameras[[0]], world_from_cam=pose))
Image.fromarray((image[0].clamp(0, 1).permute(1, 2, 0) * 255).byte().numpy()).save(OUT / "new_view.png")
print(f"{OUT / 'new_view.png'}: {alpha.mean():.0%} of it covered")
