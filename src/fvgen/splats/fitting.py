"""Gaussians fitted to posed views by gradient descent (Kerbl et al. 2023), their number kept by moving the dead ones to
where the living are (Kheradmand et al. 2024, "3D Gaussian Splatting as Markov Chain Monte Carlo").

On a GPU with gsplat its rasteriser draws, elsewhere `fvgen.geometry.gaussians`; the rest is the same.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from scipy.spatial import cKDTree
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.gaussians import Gaussians, render_gaussians

DEAD = 0.005  # opacity below which a Gaussian shows nothing
EVERY = 100  # iterations between two moves of the dead
Draw = Callable[[Gaussians, Cameras], Tensor]
DrawAll = Callable[[Gaussians, Cameras], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class FitSettings:
    """Rates are Adam's; that of the means is in units of the first scales' median and falls to a hundredth."""

    iterations: int = 500
    most: int = 4000  # Gaussians
    growth: float = 0.05  # more of them, as a share, at every move
    ssim_weight: float = 0.2  # the rest is the absolute error
    generated_weight: float = 0.1  # of a generated view beside a photograph's 1
    means_lr: float = 0.05
    scales_lr: float = 0.01
    rotations_lr: float = 0.005
    opacities_lr: float = 0.05
    colors_lr: float = 0.01
    shrink: float = 0.01  # weight of mean opacity and of mean scale (in units as above): what shows nothing fades

    def __post_init__(self) -> None:
        if not 1 <= self.iterations <= 1_000_000:
            raise UserError(f"iterations={self.iterations} is not possible; give 1 to 1000000")
        if not 1 <= self.most <= 10_000_000:
            raise UserError(f"most={self.most} Gaussians are not possible; give 1 to 10000000")
        if not 0 < self.generated_weight <= 1:
            raise UserError(f"generated_weight={self.generated_weight} is not possible; give a number in (0, 1]")


class Model:
    """The Gaussians as they are learnt: parameters without bounds, with Adam's moments beside them."""

    def __init__(self, start: Gaussians, settings: FitSettings) -> None:
        logits = torch.logit(start.opacities.clamp(1e-4, 1 - 1e-4))
        values = {
            "means": start.means,
            "scales": start.scales.log(),
            "rotations": start.rotations,
            "opacities": logits,
            "colors": start.colors,
        }
        self.unit = start.scales.median().item()
        self.values = {name: x.detach().clone().requires_grad_() for name, x in values.items()}
        rates = {name: getattr(settings, f"{name}_lr") for name in values}
        rates["means"] *= self.unit
        groups = [{"params": [x], "lr": rates[name], "name": name} for name, x in self.values.items()]
        self.optimizer = torch.optim.Adam(groups, eps=1e-15)
        self.means_lr = rates["means"]

    def gaussians(self) -> Gaussians:
        v = self.values
        return Gaussians(v["means"], v["scales"].exp(), v["rotations"], v["opacities"].sigmoid(), v["colors"])

    @torch.no_grad()
    def move(self, settings: FitSettings, generator: torch.Generator) -> None:
        """The dead, and ``growth`` more, become copies of living ones, drawn by opacity; original and copy share what
        was one (equation 9)."""
        opacities = self.values["opacities"].sigmoid()
        dead = (opacities < DEAD).nonzero().flatten()
        alive = (opacities >= DEAD).nonzero().flatten()
        if not len(alive):
            return
        count = len(opacities)
        new = max(0, min(settings.most, math.ceil(count * (1 + settings.growth))) - count)
        wanted = len(dead) + new
        if not wanted:
            return
        distinct = min(wanted, len(alive))
        chosen = alive[torch.multinomial(opacities[alive].cpu(), distinct, generator=generator).to(alive.device)]
        halves, shrunk = halved(opacities[chosen])
        self.values["opacities"][chosen] = torch.logit(halves.clamp(DEAD, 1 - 1e-4))
        self.values["scales"][chosen] += shrunk.log()[:, None]
        rows = torch.cat([torch.arange(count, device=alive.device), chosen[len(dead) :]])
        rows[dead[:distinct]] = chosen[: len(dead)]
        touched = torch.cat([chosen, dead[:distinct], torch.arange(count, len(rows), device=alive.device)])
        for group in self.optimizer.param_groups:
            old = group["params"][0]
            kept = self.optimizer.state.pop(old, {})
            grown = old[rows].detach().clone().requires_grad_()
            for key in ("exp_avg", "exp_avg_sq"):
                if key in kept:
                    kept[key] = kept[key][rows]
                    kept[key][touched] = 0
            group["params"][0], self.values[group["name"]] = grown, grown
            self.optimizer.state[grown] = kept


def halved(opacity: Tensor) -> tuple[Tensor, Tensor]:
    """Opacity [N] of each of two equal Gaussians in one place that together let through what one of ``opacity`` does,
    and the factor of their scales [N] (Kheradmand et al., equation 9, for two)."""
    half = 1 - (1 - opacity).sqrt()
    return half, opacity / (2 * half - half * half / math.sqrt(2))


def seeds(points: Tensor, colors: Tensor, most: int, generator: torch.Generator) -> Gaussians:
    """Round Gaussians [N] at points [N, 3] with colors [N, 3] in [0, 1]: as large as the way to the nearest three, half
    opaque; at most ``most``, drawn by ``generator``."""
    if len(points) > most:
        chosen = torch.randperm(len(points), generator=generator)[:most]
        points, colors = points[chosen], colors[chosen]
    near = min(4, len(points))
    distance, _ = cKDTree(points.double().numpy()).query(points.double().numpy(), k=near)
    away = torch.from_numpy(distance).float().reshape(len(points), -1)[:, 1:]
    size = away.square().mean(dim=1).sqrt() if near > 1 else torch.full((len(points),), 0.01)
    size = size.clamp(min=size.median().item() * 0.1 or 1e-6, max=size.median().item() * 5 or 1.0)
    turn = torch.tensor([1.0, 0, 0, 0]).repeat(len(points), 1)
    scales = size[:, None].repeat(1, 3)
    return Gaussians(points.float(), scales, turn, torch.full((len(points),), 0.5), colors.float())


def fit(
    images: Tensor,
    cameras: Cameras,
    start: Gaussians,
    settings: FitSettings | None = None,
    weights: Tensor | None = None,
    seed: int = 0,
    device: str = "cpu",
    on_step: Callable[[int, int], None] = lambda done, total: None,
    masks: Tensor | None = None,
) -> Gaussians:
    """Gaussians (on the CPU) that show ``images`` [V, 3, H, W] in [0, 1] through ``cameras``.

    weights: [V] of the views' losses, 1 each if not given. masks: [V, H, W] bool, where the views count, all if not
    given: elsewhere both are black to the loss, also within SSIM's windows. The same seed gives the same Gaussians on
    the same machine.
    """
    settings = settings or FitSettings()
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(len(images)) if weights is None else weights
    if masks is not None:
        masks = masks.to(device)
        images = torch.where(masks[:, None], images.to(device), 0.0)
    images, cameras, model = images.to(device), cameras.to(device), Model(start.to(device), settings)
    draw, order = drawer(device), torch.empty(0, dtype=torch.long)
    for iteration in range(settings.iterations):
        if not len(order):
            order = torch.randperm(len(images), generator=generator)
        view, order = int(order[0]), order[1:]
        model.optimizer.param_groups[0]["lr"] = model.means_lr * 0.01 ** (iteration / settings.iterations)
        gaussians = model.gaussians()
        shown = draw(gaussians, cameras[[view]])
        if masks is not None:
            shown = torch.where(masks[view], shown, 0.0)
        loss = weights[view] * view_loss(shown, images[view : view + 1], settings.ssim_weight)
        loss = loss + settings.shrink * (gaussians.opacities.mean() + gaussians.scales.mean() / model.unit * 0.1)
        model.optimizer.zero_grad()
        loss.backward()
        model.optimizer.step()
        with torch.no_grad():  # other viewers cut what lies beyond, each in its own way
            model.values["colors"].clamp_(0, 1)
        if (iteration + 1) % EVERY == 0 and iteration + 1 < 0.8 * settings.iterations:
            model.move(settings, generator)
        on_step(iteration + 1, settings.iterations)
    made = model.gaussians()
    return Gaussians(*(getattr(made, name).detach().cpu() for name in made.__dataclass_fields__))


def view_loss(shown: Tensor, truth: Tensor, ssim_weight: float) -> Tensor:
    """(1 - w) |difference| + w (1 - SSIM) of images [1, 3, H, W] (Kerbl et al., equation 7)."""
    difference = (shown - truth).abs().mean()
    if not ssim_weight:
        return difference
    alike = structural_similarity_index_measure(shown, truth, data_range=1.0)
    return (1 - ssim_weight) * difference + ssim_weight * (1 - alike)


def lacks_gsplat() -> str | None:
    """Why gsplat cannot draw on a GPU of this machine, or None: its wheel compiles its kernels at the first call."""
    if not find_spec("gsplat"):
        return "gsplat is not installed"
    compiled = bool(find_spec("gsplat.csrc"))
    return None if compiled or shutil.which("nvcc") else "gsplat compiles its kernels with nvcc, which is not here"


def drawer(device: str) -> Draw:
    """(Gaussians, one view) to its image [1, 3, H, W], see `drawer_of_all`."""
    draw = drawer_of_all(device)
    return lambda gaussians, cameras: draw(gaussians, cameras)[0]


def drawer_of_all(device: str) -> DrawAll:
    """gsplat's rasteriser where it can run, else ours: (Gaussians, one view) to image [1, 3, H, W], alpha [1, 1, H, W]
    and depth times alpha [1, 1, H, W]."""
    if not device.startswith("cuda") or lacks_gsplat():
        return render_gaussians

    import gsplat

    def draw(gaussians: Gaussians, cameras: Cameras) -> tuple[Tensor, Tensor, Tensor]:
        g = gaussians
        views, lenses = cameras.cam_from_world.float(), cameras.intrinsics.float()
        size = (cameras.width, cameras.height)
        drawn, alpha, _ = gsplat.rasterization(
            g.means, g.rotations, g.scales, g.opacities, g.colors, views, lenses, *size, render_mode="RGB+D"
        )
        image, alpha = drawn.permute(0, 3, 1, 2), alpha.permute(0, 3, 1, 2)
        return image[:, :3], alpha, image[:, 3:]

    return draw
