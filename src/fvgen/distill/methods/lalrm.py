"""LaLRM (Wonderland, Liang et al. 2025, section 3.3): a network that makes 3D Gaussians of a clip's latents.

    G      = lalrm(z, cameras)                             z: latents of the true frames, from the frozen VAE
    loss   = mean over views of  |render(G, view) - image|^2 + p LPIPS + d |log depth - log depth'|
             + o mean over Gaussians of  |colour - pixels|^2 + d |log depth - log depth'|

Views are some of the clip's own frames and some that are none of it: only those show whether surfaces stand where they
should. The teacher gives its VAE; its network is not run. The paper's squared error and perceptual loss (VGG-19, its
weight lost) are kept, with LPIPS as the latter; the depth term is ours, for scenes that know it. docs/wonderland.md
says where each default is from.

The last line, ours too, holds each Gaussian to the pixels of its own frame that it stands for. Nothing is drawn for it,
so ``own_iterations`` of it alone are cheap, and after them views are near enough to the truth to say what is wrong:
Gaussians of all frames at wrong depths are a blur that hardly changes with any of them.

Views are drawn one at a time, each with its own backward pass down to the Gaussians, whose gradients add up; then one
pass goes through the network. So memory does not grow with their number, and nothing is drawn twice.

Stages: ``teacher=RUN/model``, which holds a LaLRM, goes on with it, on other data (a higher resolution, generated
clips), as the paper's second stage.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fvgen.clips.worlds import is_builtin
from fvgen.distill.draws import Draws
from fvgen.distill.learners import Learner
from fvgen.distill.methods.base import Deal, Method, Metrics, Setup
from fvgen.distill.settings import Data, Memory, MethodSettings, Run
from fvgen.errors import UserError
from fvgen.geometry.cameras import Cameras
from fvgen.geometry.gaussians import Gaussians
from fvgen.geometry.plucker import unpacked
from fvgen.metrics.image import NETWORK_MINIMUM, lpips_network
from fvgen.metrics.weights import Unavailable
from fvgen.models.condition import Condition
from fvgen.objectives.views import log_depth, own_pixels, square

if TYPE_CHECKING:  # the libraries behind the networks take seconds and a quarter of a gigabyte to import
    from fvgen.clips.latents import LatentBatch
    from fvgen.distill.settings import StageConfig

NETWORK = ("patch", "width", "layers", "head_dim", "pitch", "near", "far", "typical", "cameras", "planes")


class LalrmSettings(MethodSettings):
    """Sizes and the rate's cosine are the paper's (section 3.3), rates GS-LRM's and Long-LRM's, the number of views
    ours."""

    all_learners: ClassVar[tuple[str, ...]] = ("lalrm",)
    optimizer: ClassVar[Mapping[str, Any]] = {
        "lr": 4e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.05, "lr_schedule": "cosine"
    }  # fmt: skip
    whole: ClassVar[bool] = True
    result: ClassVar[str] = "model"

    patch: int = Field(2, ge=1, le=64, description="latent pixels to a token, along each side")
    width: int = Field(1024, ge=8, le=1 << 17, description="channels of a token")
    layers: int = Field(24, ge=1, le=512)
    head_dim: int = Field(64, ge=4, le=1024, description="channels of an attention head")
    pitch: int = Field(2, ge=1, le=64, description="pixels from a Gaussian to the next; 1 is one for every pixel")
    near: float = Field(0.2, gt=0, le=1e6, description="least distance of a Gaussian, in units of the clip's path")
    far: float = Field(20.0, gt=0, le=1e9, description="largest distance")
    typical: float = Field(3.0, gt=0, le=1e9, description="distance at the start")
    cameras: bool = Field(True, description="the network looks at the rays; false is an ablation")
    planes: int = Field(0, ge=0, le=1024, description="of a sweep through the clip that the network sees; 0 for none")
    seen_views: int = Field(2, ge=0, le=64, description="of a clip's own frames, in every update")
    unseen_views: int = Field(2, ge=0, le=64, description="of the scene's other views; 0 is an ablation")
    others: int = Field(8, ge=0, le=64, description="views off the path that built-in clips are made with")
    perceptual_weight: float = Field(0.5, ge=0, le=1e3, description="of LPIPS, in the loss")
    depth_weight: float = Field(0.05, ge=0, le=1e3, description="of the logarithm's error, where depth is known")
    own_weight: float = Field(
        0.0, ge=0, le=1e3, description="of each Gaussian's colour and depth against the pixels of its own frame"
    )
    own_iterations: int = Field(0, ge=0, le=10**9, description="first ones that learn from these alone; none is drawn")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="of the averaged weights, which are the result")

    def learners(self) -> tuple[str, ...]:
        return self.all_learners

    def judge(self, run: Run, data: Data, memory: Memory) -> None:
        if not self.seen_views + self.unseen_views:
            raise ValueError("seen_views=0 and unseen_views=0 leave nothing to learn from; give one of them")
        if self.unseen_views and not self.others and is_builtin(data.data):
            raise ValueError("unseen_views needs others=N views that built-in clips are made with; give it, or set 0")
        if self.own_iterations and not self.own_weight:
            raise ValueError("own_iterations with own_weight=0 have nothing to learn from; set own_weight")
        if self.own_iterations >= run.iterations:
            raise ValueError(f"own_iterations={self.own_iterations} leave no iteration to draw views in; set less")
        if self.planes and not self.cameras:
            raise ValueError(f"planes={self.planes} need to know the cameras; set cameras=true, or planes=0")
        if run.init:
            raise ValueError(f"init={run.init} has no effect here; to go on, give teacher=RUN/{self.result}")
        for name in ("share_backbone", "offload_teacher"):
            if getattr(memory, name):
                raise ValueError(f"{name}=true has no effect here: the teacher's network is not run; leave it out")

    def of_network(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in NETWORK}


Draw = Callable[[Gaussians, Cameras], tuple[Tensor, Tensor, Tensor]]


class Lalrm(Method):
    """One network, and what its Gaussians look like."""

    needs = frozenset({"views"})
    runs_teacher, samples = False, "frames"
    exported = ("lalrm",)

    def __init__(self, settings: LalrmSettings, lalrm: Learner, draw: Draw, perceptual: nn.Module | None) -> None:
        self.settings, self.draw, self.perceptual = settings, draw, perceptual
        self.learners, self.states = {"lalrm": lalrm}, {}

    @classmethod
    def build(cls, setup: Setup) -> Lalrm:
        from fvgen.models.lalrm import LaLRM
        from fvgen.splats.fitting import drawer_of_all

        settings, memory, device = setup.config.method, setup.config.memory, setup.device
        planned = device.type == "meta"
        torch.manual_seed(setup.config.run.seed)
        channels, frames, pixels = setup.base.latent_grid
        grid = {"latent_channels": channels, "time_squeeze": frames, "space_squeeze": pixels}
        earlier = getattr(setup.base, "lalrm", None)
        network = LaLRM(**grid, **settings.of_network()) if earlier is None else copy.deepcopy(earlier)
        for name, value in settings.of_network().items():
            if network.config[name] != value:
                raise UserError(
                    f"{name}={value}, but the teacher's LaLRM has {name}={network.config[name]}; give that to go on "
                    "with it"
                )
        if not planned:
            setup.base.with_lalrm(network)  # refused before hours of training, not at their end
        setup.teacher.network.to("meta" if planned else "cpu")  # it is not run
        exact = {name: p.detach().clone() for name, p in network.named_parameters()}
        if memory.precision == "bfloat16":
            nn.Module.to(network, torch.bfloat16)  # diffusers' own warns of nothing
        if memory.checkpoint_activations:
            network.enable_gradient_checkpointing()
        network = network.to(device).train().requires_grad_(True)
        start_at = exact if memory.precision == "bfloat16" and not planned else None
        learner = setup.learner("lalrm", network, average=True, start_at=start_at)
        perceptual = None
        if settings.perceptual_weight and not planned:
            try:
                perceptual = lpips_network(device)[0]
            except Unavailable as error:
                raise UserError(f"perceptual_weight needs LPIPS ({error}); or set perceptual_weight=0") from error
        return cls(settings, learner, _uncounted if planned else drawer_of_all(str(device)), perceptual)

    def export(self, folder: Path, weights: Mapping[str, Mapping[str, Tensor]], base: Any, config: StageConfig) -> None:
        from fvgen.pipelines.folders import save_model

        network = type(self.network).from_config(self.network.config).eval()
        network.load_state_dict(dict(weights["lalrm"]))
        save_model(base.with_lalrm(network), folder / config.method.result)

    @property
    def network(self) -> nn.Module:
        return self.learners["lalrm"].module

    def iterate(self, iteration: int, deal: Deal) -> list[Metrics]:
        learner, rows = self.learners["lalrm"], []
        for batch, draws in deal():
            loss, metrics = self.loss(batch, draws, iteration > self.settings.own_iterations)
            rows.append({**metrics, "grad_norm_lalrm": learner.update(loss)})
        if learner.average is not None:
            learner.average.update()
        return rows

    def loss(self, batch: LatentBatch, draws: Draws, drawn: bool = True) -> tuple[Tensor, Metrics]:
        """A scalar whose gradient is the loss's, and the loss with its parts; ``drawn``: views are."""
        views = batch.views
        size, clips = views["images"].shape[-2:], len(batch.latents)
        if self.perceptual is not None and min(size) < NETWORK_MINIMUM:
            raise UserError(
                f"perceptual_weight needs LPIPS, for which images of {size[0]}x{size[1]} are too small; set 0"
            )
        numbers, frames = self.numbers(batch)
        chosen = self.chosen(views, frames, draws)
        total, surrogate, parts = 0.0, 0.0, {"loss_lalrm_square": 0.0} if drawn else {}
        for clip in range(clips):
            own = unpacked(views["path"][clip, :frames], *size)
            made = self.made(numbers[clip], own)
            if self.settings.own_weight:
                loss = self.own_loss(made, own, numbers.shape[-2], views.rows([clip])) / clips
                surrogate, total = surrogate + loss, total + loss.detach()
                parts["loss_lalrm_own"] = parts.get("loss_lalrm_own", 0.0) + loss.detach()
            if not drawn:
                continue
            fields = [getattr(made, name) for name in made.__dataclass_fields__]
            leaves = [field.detach().requires_grad_() for field in fields]
            for view in chosen[:, clip].split(1):
                terms = self.view_terms(Gaussians(*leaves), one_view(views, clip, view))
                loss = sum(terms.values()) / (clips * len(chosen))
                loss.backward()
                total = total + loss.detach()
                for name, term in terms.items():
                    parts[name] = parts.get(name, 0.0) + term.detach() / (clips * len(chosen))
            surrogate = surrogate + sum((f * leaf.grad).sum() for f, leaf in zip(fields, leaves, strict=True))
        return surrogate, {"loss_lalrm": total, **parts}

    def numbers(self, batch: LatentBatch) -> tuple[Tensor, int]:
        """[B, 12, F, H', W'] float32, and F: a clip's own frames are the first of its views."""
        settings = self.network.config
        frames = (batch.latents.shape[2] - 1) * settings["time_squeeze"] + 1
        dtype = next(self.network.parameters()).dtype
        return self.network(batch.latents.to(dtype), batch.views["path"][:, :frames]).float(), frames

    def made(self, numbers: Tensor, cameras: Cameras) -> Gaussians:
        """Of a clip's ``numbers`` [12, F, H', W']."""
        from fvgen.splats.raymap import gaussians_along

        return gaussians_along(numbers, cameras, self.network.config)

    def chosen(self, views: Condition, frames: int, draws: Draws) -> Tensor:
        """[n, B] numbers of views: of the clip's own frames, then of the others."""
        count, like = views["images"].shape[1], views["path"]
        settings = self.settings
        if settings.unseen_views and count == frames:
            raise UserError(
                f"unseen_views={settings.unseen_views}, but the data have no views beside the clips' own frames; "
                "set 0, or prepare the scenes with --keep-frames --others N"
            )
        seen = [draws.integers(0, frames, like) for _ in range(settings.seen_views)]
        return torch.stack([*seen, *(draws.integers(frames, count, like) for _ in range(settings.unseen_views))])

    def own_loss(self, made: Gaussians, cameras: Cameras, rows: int, views: Condition) -> Tensor:
        """The term that nothing is drawn for, weighed, a scalar; ``rows`` of Gaussians in a frame."""
        from fvgen.splats.raymap import own_grid

        frames, settings = len(cameras), self.settings
        known = views["depth"][0, :frames] if settings.depth_weight and "depth" in views else None
        truth, shown = views["images"][0, :frames].float() / 255, views["shown"][0, :frames]
        color, depth = own_pixels(*own_grid(made, cameras, rows), truth, shown, known)
        return settings.own_weight * (color if depth is None else color + settings.depth_weight * depth)

    def view_terms(self, made: Gaussians, view: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The terms of `one_view`'s loss, weighed, each a scalar."""
        truth = view["images"].float() / 255
        image, alpha, depth = self.draw(made, unpacked(view["path"], *truth.shape[-2:]))
        image = torch.where(view["shown"][:, None], image, truth)  # what a mask hides is no part of the scene
        terms = {"loss_lalrm_square": square(image, truth).mean()}
        if self.perceptual is not None:
            distance = self.perceptual(image.clamp(0, 1), truth, normalize=True)
            terms["loss_lalrm_lpips"] = self.settings.perceptual_weight * distance.mean()
        if self.settings.depth_weight and "depth" in view:
            error = log_depth(depth, alpha, view["depth"])
            terms["loss_lalrm_depth"] = self.settings.depth_weight * error.mean()
        return terms

    @torch.no_grad()
    def sample(self, batch: LatentBatch, seed: int) -> Tensor:
        """The clips' own frames as their Gaussians show them."""
        numbers, frames = self.numbers(batch)
        size, paths = batch.views["images"].shape[-2:], batch.views["path"][:, :frames]
        shown = []
        for own, path in zip(numbers, paths, strict=True):
            cameras = unpacked(path, *size)
            made = self.made(own, cameras)
            shown.append(torch.cat([self.draw(made, cameras[[view]])[0] for view in range(frames)]))
        return torch.stack(shown).clamp(0, 1)


def one_view(views: Condition, clip: int, view: Tensor) -> dict[str, Tensor]:
    """[1, ...] of what a clip has of the view numbered ``view`` [1]."""
    return {name: x[clip].index_select(0, view) for name, x in views.items()}


def _uncounted(made: Gaussians, camera: Cameras) -> tuple[Tensor, Tensor, Tensor]:
    """For the planner, which has no numbers to draw with: an image that depends on everything. What a rasteriser keeps
    (40 bytes or so for every Gaussian that a pixel sees, of one view) is not counted."""
    value = sum(getattr(made, name).sum() for name in made.__dataclass_fields__)
    return tuple(value.expand(1, channels, camera.height, camera.width) for channels in (3, 1, 1))
