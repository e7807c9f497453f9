"""3D Gaussians to images in plain torch, with gsplat's rules: the reference for machines without CUDA.

Every Gaussian is expanded to the pixels that it reaches; the pairs are sorted by pixel and depth and composited front
to back. Time and memory follow the number of pairs. Sources: Kerbl et al. 2023, sections 4 and 6; Zwicker et al. 2002
(the projection); gsplat 1.5's documentation and projection rules (clamped slopes, 0.3 square pixels of low-pass,
opacity at most 0.999, nothing below 1/255, an end where less than 1e-4 shines through).

Letters: N Gaussians, M pairs, P = H W pixels, C channels. Cameras as in `fvgen.geometry.cameras`: OpenCV axes, the
centre of the first pixel at (0.5, 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fvgen.geometry.cameras import Cameras

LOW_PASS = 0.3  # square pixels, added to the projected covariance
LEAST_ALPHA, MOST_ALPHA = 1 / 255, 0.999
LEAST_LEFT = 1e-4  # a pixel is done where less than this would shine through
NEAR = 0.01  # nothing nearer to the camera is drawn
SLOPE = 1.3  # how far outside the image, in half images, the projection's slope still changes


@dataclass(frozen=True)
class Gaussians:
    """means [N, 3] in the world, scales [N, 3] > 0 in its units, rotations [N, 4] quaternions w x y z of any length,
    opacities [N] in [0, 1], colors [N, 3], 0 to 1 (values beyond are kept)."""

    means: Tensor
    scales: Tensor
    rotations: Tensor
    opacities: Tensor
    colors: Tensor

    def __post_init__(self) -> None:
        count = self.means.shape[0]
        shapes = {"means": (3,), "scales": (3,), "rotations": (4,), "opacities": (), "colors": (3,)}
        for name, rest in shapes.items():
            assert getattr(self, name).shape == (count, *rest), (name, getattr(self, name).shape)

    def __len__(self) -> int:
        return self.means.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Gaussians:
        return replace(self, **{name: getattr(self, name)[index] for name in self.__dataclass_fields__})

    def to(self, device: Any) -> Gaussians:
        return replace(self, **{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})


class Projected(NamedTuple):
    """In pixels of one view: centers [N, 2], conics [N, 3] (xx, xy, yy of the inverse covariance), depths [N], and
    deviations [N, 2], the roots of the covariance's diagonal. What lies behind has depth <= `NEAR`, and nonsense."""

    centers: Tensor
    conics: Tensor
    depths: Tensor
    deviations: Tensor


def rotation_matrices(quaternions: Tensor) -> Tensor:
    """[N, 4] w x y z of any length but zero to [N, 3, 3]."""
    w, x, y, z = normalize(quaternions, dim=-1).unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def project_gaussians(gaussians: Gaussians, cameras: Cameras) -> Projected:
    """Of one view (``cameras`` holds one): the affine approximation of the projection around each centre."""
    assert len(cameras) == 1
    pose, lens = cameras.cam_from_world[0].to(gaussians.means), cameras.intrinsics[0].to(gaussians.means)
    local = gaussians.means @ pose[:3, :3].T + pose[:3, 3]
    depth = local[:, 2]
    z = torch.where(depth > NEAR, depth, torch.ones_like(depth))
    fx, fy, cx, cy = lens[0, 0], lens[1, 1], lens[0, 2], lens[1, 2]
    beyond_x, beyond_y = (SLOPE - 1) * cameras.width / (2 * fx), (SLOPE - 1) * cameras.height / (2 * fy)
    slope_x, slope_y = local[:, 0] / z, local[:, 1] / z
    held_x = slope_x.clamp(-cx / fx - beyond_x, (cameras.width - cx) / fx + beyond_x)
    held_y = slope_y.clamp(-cy / fy - beyond_y, (cameras.height - cy) / fy + beyond_y)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -fx * held_x / z, zero, fy / z, -fy * held_y / z], dim=-1).unflatten(
        -1, (2, 3)
    )
    # J R Q diag(s), whose square is the covariance: its diagonal cannot come out negative.
    root = jacobian @ (pose[:3, :3] @ rotation_matrices(gaussians.rotations)) * gaussians.scales[:, None, :]
    covariance = root @ root.transpose(1, 2)
    xx, xy, yy = covariance[:, 0, 0] + LOW_PASS, covariance[:, 0, 1], covariance[:, 1, 1] + LOW_PASS
    determinant = xx * yy - xy * xy
    return Projected(
        torch.stack([fx * slope_x + cx, fy * slope_y + cy], dim=-1),
        torch.stack([yy, -xy, xx], dim=-1) / determinant[:, None],
        depth,
        torch.stack([xx, yy], dim=-1).sqrt(),
    )


@torch.no_grad()
def find_pairs(seen: Projected, opacities: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(gaussian [M], pixel [M] = row * width + column) of all pairs whose alpha reaches 1/255, by pixel and depth."""
    device = seen.depths.device
    # exp(-d^2 / 2 s^2) o >= 1/255 within this many deviations: an axis-aligned box around the ellipse.
    reach = (2 * (opacities / LEAST_ALPHA).clamp(min=1.0).log()).sqrt()[:, None] * seen.deviations
    size = torch.tensor([width, height], device=device)
    low = (seen.centers - reach - 0.5).ceil().clamp(min=0).minimum(size)
    high = (seen.centers + reach - 0.5).floor().clamp(min=-1).minimum(size - 1)
    spans = (high - low + 1).clamp(min=0)
    drawn = (seen.depths > NEAR) & (opacities >= LEAST_ALPHA) & (spans.prod(dim=1) > 0)
    order = drawn.nonzero().flatten()
    order = order[seen.depths[order].argsort(stable=True)]
    low, spans = low[order].to(torch.int32), spans[order].to(torch.int32)
    counts = spans.prod(dim=1)
    pair = torch.repeat_interleave(torch.arange(len(order), device=device), counts)
    begins = (counts.cumsum(0) - counts).to(torch.int32)
    begin, columns, left, top = torch.stack([begins, spans[:, 0], low[:, 0], low[:, 1]]).index_select(1, pair)
    within = torch.arange(len(pair), dtype=torch.int32, device=device) - begin
    row = torch.div(within, columns, rounding_mode="floor")
    x, y = left + within - row * columns, top + row
    gaussian, pixel = order.index_select(0, pair), y * width + x
    x, y = (place.to(seen.depths.dtype) + 0.5 for place in (x, y))
    alpha, _ = _alphas(seen.centers, seen.conics, opacities, gaussian, x, y)
    kept = (alpha >= LEAST_ALPHA).nonzero().flatten()
    pixel = pixel.index_select(0, kept)
    by_pixel = _stable_order(pixel)
    return gaussian.index_select(0, kept.index_select(0, by_pixel)), pixel.index_select(0, by_pixel).long()


def render_gaussians(
    gaussians: Gaussians, cameras: Cameras, background: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Images [V, 3, H, W] over ``background`` [3] (black if not given), alphas [V, 1, H, W] and depths [V, 1, H, W],
    the mean depth times alpha. Differentiable in all that Gaussians have and in the background."""
    background = torch.zeros(3) if background is None else background
    views = [_render_view(gaussians, cameras[[v]], background.to(gaussians.means)) for v in range(len(cameras))]
    return tuple(torch.stack(each) for each in zip(*views, strict=True))


def _render_view(gaussians: Gaussians, cameras: Cameras, background: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    height, width = cameras.height, cameras.width
    seen = project_gaussians(gaussians, cameras)
    gaussian, pixel = find_pairs(seen, gaussians.opacities, height, width)
    values = torch.cat([gaussians.colors, seen.depths[:, None]], dim=1)
    image, alpha = Composite.apply(
        seen.centers, seen.conics, gaussians.opacities, values, gaussian, pixel, height * width, width
    )
    color = image[:, :3] + (1 - alpha)[:, None] * background
    maps = (color, alpha[:, None], image[:, 3:])
    return tuple(each.T.unflatten(1, (height, width)) for each in maps)


class Composite(torch.autograd.Function):
    """Front-to-back compositing of sorted pairs, with its gradient written out: autograd's own keeps and revisits a
    dozen arrays of M numbers, this one four.

    With T_j what shines through the pairs in front of j in its pixel, w_j = T_j alpha_j and v_j = dL/dw_j:
    dL/dalpha_j = T_j v_j - sum over k behind j of w_k v_k / (1 - alpha_j).
    """

    @staticmethod
    def forward(
        ctx: Any,
        centers: Tensor,
        conics: Tensor,
        opacities: Tensor,
        values: Tensor,
        gaussian: Tensor,
        pixel: Tensor,
        pixels: int,
        width: int,
    ) -> tuple[Tensor, Tensor]:
        """Pixels [P, C] over black and alphas [P] of ``values`` [N, C]."""
        x, y = pixel % width + 0.5, torch.div(pixel, width, rounding_mode="floor") + 0.5
        alpha, _ = _alphas(centers, conics, opacities, gaussian, x.to(centers), y.to(centers))
        # One running sum over all pairs, minus its value where the pixel begins: float32 would lose digits.
        passed = torch.log1p(-alpha.double()).cumsum(0)
        before = torch.cat([passed.new_zeros(1), passed])[:-1]
        first = _starts(pixel, pixels)
        left = (before - before.index_select(0, first.index_select(0, pixel))).exp().to(alpha)
        counts = left * (1 - alpha) >= LEAST_LEFT
        weight = torch.where(counts, left * alpha, 0)
        worn = weight[:, None] * values.index_select(0, gaussian)
        image = values.new_zeros(pixels, values.shape[1]).index_add_(0, pixel, worn)
        total = values.new_zeros(pixels).index_add_(0, pixel, weight)
        ctx.save_for_backward(centers, conics, opacities, values, gaussian, pixel, weight, left)
        ctx.width = width
        return image, total

    @staticmethod
    def backward(ctx: Any, image_gradient: Tensor, total_gradient: Tensor) -> tuple[Tensor | None, ...]:
        centers, conics, opacities, values, gaussian, pixel, weight, left = ctx.saved_tensors
        of_pixel = image_gradient.index_select(0, pixel)
        of_weight = (values.index_select(0, gaussian) * of_pixel).sum(dim=1) + total_gradient.index_select(0, pixel)
        pushed = (weight * of_weight).double().cumsum(0)
        pixels = len(total_gradient)
        last = _starts(pixel, pixels, last=True)
        behind = (pushed.index_select(0, last.index_select(0, pixel)) - pushed).to(weight)

        x, y = pixel % ctx.width + 0.5, torch.div(pixel, ctx.width, rounding_mode="floor") + 0.5
        x, y = x.to(centers), y.to(centers)
        alpha, falloff = _alphas(centers, conics, opacities, gaussian, x, y)
        of_alpha = left * of_weight - behind / (1 - alpha)
        of_alpha = torch.where((weight > 0) & (alpha < MOST_ALPHA), of_alpha, 0)
        of_power = -alpha * of_alpha
        u, v, xx, xy, yy = torch.cat([centers.T, conics.T]).index_select(1, gaussian)
        dx, dy = x - u, y - v
        columns = [
            -of_power * (xx * dx + xy * dy),
            -of_power * (xy * dx + yy * dy),
            of_power * 0.5 * dx * dx,
            of_power * dx * dy,
            of_power * 0.5 * dy * dy,
            falloff * of_alpha,
        ]
        rows = torch.cat([torch.stack(columns, dim=1), weight[:, None] * of_pixel], dim=1)
        gradient = rows.new_zeros(len(opacities), rows.shape[1]).index_add_(0, gaussian, rows)
        return gradient[:, :2], gradient[:, 2:5], gradient[:, 5], gradient[:, 6:], None, None, None, None


def _alphas(
    centers: Tensor, conics: Tensor, opacities: Tensor, gaussian: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """alpha [M] at pixel centres x, y [M], and exp(-power) [M]."""
    table = torch.cat([centers.T, conics.T, opacities[None]])  # gathered by rows, each as it lies in memory
    u, v, xx, xy, yy, opacity = table.index_select(1, gaussian)
    dx, dy = x - u, y - v
    falloff = (-0.5 * (xx * dx * dx + yy * dy * dy) - xy * dx * dy).exp()
    return (opacity * falloff).clamp(max=MOST_ALPHA), falloff


def _starts(pixel: Tensor, pixels: int, last: bool = False) -> Tensor:
    """[P] where each pixel's run of pairs begins (or ends) in sorted ``pixel`` [M]; anything for empty pixels."""
    ends = torch.searchsorted(pixel, torch.arange(pixels, device=pixel.device), right=last)
    return (ends - int(last)).clamp(0, max(0, len(pixel) - 1))


def _stable_order(keys: Tensor) -> Tensor:
    """The stable sorting order of integers >= 0 [M]: on a CPU by numpy's radix sort, which takes 16 bits at a time."""
    if keys.device.type != "cpu":
        return torch.sort(keys, stable=True).indices
    numbers = keys.numpy()
    order = np.argsort(numbers.astype(np.uint16), kind="stable")
    if len(numbers) and numbers.max() >= 1 << 16:
        order = order[np.argsort((numbers[order] >> 16).astype(np.uint16), kind="stable")]
    return torch.from_numpy(order)
