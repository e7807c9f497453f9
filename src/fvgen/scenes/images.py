"""Images and depth maps from files of any kind, upright, without lens distortion, and cut to the size of a clip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fvgen.errors import UserError, first_line
from fvgen.geometry.cameras import fit_box
from fvgen.system.doors import open_array, open_image, other_kind, problem, there
from fvgen.system.packages import install

EXIF_ORIENTATION = 0x0112
HEIC = (".heic", ".heif", ".hif")
# An undistorted image is enlarged until it shows nothing from outside the photograph, but never more than this.
LARGEST_ZOOM = 1.6


def load_image(path: str | Path, upright: bool = True) -> np.ndarray:
    """uint8 [H, W, 3], turned upright by the EXIF tag, whatever the file holds: see `rgb`.

    Raises UserError when the file is missing, cut short or no image.
    """
    return rgb(_decode(Path(path), upright), path)


def rgb(image: Image.Image, path: str | Path = "") -> np.ndarray:
    """uint8 [H, W, 3] of an image that is upright already: grey, palette, CMYK, 16 bits, transparent (laid on white).

    The one way from an image to pixels, of files and of what is handed to a pipeline. Raises UserError for floats.
    """
    if image.mode == "F":
        raise UserError(f"image {path} holds floating-point pixels; save it with 8 or 16 bits per channel")
    if image.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion would clip at 255
        grey = (np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def upright(image: Image.Image) -> Image.Image:
    """As its EXIF tag says, if it has one."""
    return ImageOps.exif_transpose(image) if _orientation(image) != 1 else image


def load_depth(path: str | Path, unit: float) -> Tensor:
    """float32 [H, W], camera z in scene units, from 16-bit grey or a NumPy array in steps of ``unit``; 0 is unknown."""
    if Path(path).suffix.lower() == ".npy":
        values = torch.from_numpy(_array(Path(path)).astype(np.float32)) * unit
        return torch.where(values.isfinite() & (values > 0), values, 0.0)
    if Path(path).suffix.lower() == ".exr":
        raise _no_exr(path)
    image = _decode(Path(path))
    if not image.mode.startswith("I"):
        raise UserError(f"depth map {path} has pixels of kind {image.mode}, not 16-bit grey; export it as 16-bit PNG")
    return torch.from_numpy(np.asarray(image).astype(np.float32)) * unit


def depth_size(path: Path) -> tuple[int, int]:
    """(width, height) of a depth map."""
    if path.suffix.lower() == ".exr":
        raise _no_exr(path)
    return _array(path).shape[::-1] if path.suffix.lower() == ".npy" else image_size(path)


def _array(path: Path) -> np.ndarray:
    """[H, W] numbers of a .npy file, mapped; pickles in it are not run."""
    try:
        values = open_array(path)
    except (OSError, ValueError, EOFError) as error:  # a UserError of the door, too
        raise _unreadable(path, error) from error
    values = values[..., 0] if values.ndim == 3 and values.shape[-1] == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise UserError(f"depth map {path} is {values.dtype} {list(values.shape)}; save numbers [height, width]")
    return values


def _no_exr(path: str | Path) -> UserError:
    return UserError(f"depth map {path} is OpenEXR, which is not read; save it as 16-bit PNG or .npy (docs/data.md)")


def _decode(path: Path, upright: bool = True) -> Image.Image:
    if path.suffix.lower() in HEIC:
        register_heic(path)
    try:
        with open_image(path) as image:
            turned = upright and _orientation(image) != 1
            image.load()
            return ImageOps.exif_transpose(image) if turned else image
    except Exception as error:  # PIL's decoders raise nearly anything on damaged bytes
        raise _unreadable(path, error) from error


def _orientation(image: Image.Image) -> int:
    """1 is upright. A PNG's tag counts only if it precedes the pixels; to look behind, PIL decodes them."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return image.getexif().get(EXIF_ORIENTATION, 1)


def is_plain(path: Path) -> bool:
    """Whether a file is an upright 8-bit JPEG or PNG, grey or RGB, which every program reads alike."""
    try:
        with open_image(path) as image:
            return image.format in ("JPEG", "PNG") and image.mode in ("L", "RGB") and _orientation(image) == 1
    except Exception:  # as in _decode: `load_image` will say what is wrong
        return False


def image_size(path: Path, posed: bool = True, upright: bool = True) -> tuple[int, int]:
    """(width, height) after the EXIF turn (or, not ``upright``, before it), from the header.

    With poses a turn must be certain: where the tag does not exchange width and height, sizes cannot tell if
    the camera belongs to the stored or to the turned image, and the image is refused.
    """
    if path.suffix.lower() in HEIC:
        register_heic(path)
    try:
        with open_image(path) as image:
            size, orientation = image.size, _orientation(image)
    except Exception as error:  # as in _decode
        raise _unreadable(path, error) from error
    turned = size[::-1] if upright and orientation in (5, 6, 7, 8) else size
    if not upright:
        return turned
    if posed and orientation in range(2, 9) and turned == size:
        raise UserError(
            f"image {path} has EXIF orientation {orientation}, which its pose may or may not allow for; "
            "write upright pixels or remove the tag"
        )
    return turned


def _unreadable(path: Path, error: Exception) -> UserError:
    if not there(path):
        return UserError(f"image {path} does not exist; put it there or remove its frame")
    if reason := problem(path):
        return UserError(f"image {path} cannot be read ({reason}); copy it again or remove its frame")
    empty = path.is_file() and path.stat().st_size == 0
    if not empty and (other := other_kind(path)):
        return UserError(f"image {path} {other}")
    reason = "is empty (zero bytes)" if empty else f"cannot be read ({first_line(error)})"
    return UserError(f"image {path} {reason}; copy it again or remove its frame")


def register_heic(path: Path) -> None:
    """Let PIL read HEIC, which it cannot by itself. Raises UserError where the plug-in is not installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise UserError(
            f"image {path} is HEIC, which needs a plug-in; `{install('photos')}`, or convert it to JPEG or PNG"
        ) from error
    register_heif_opener()


# --- At the size of a clip ---


def fit_image(image: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 [H0, W0, 3] to float [3, height, width] in [0, 1]: the crop of `fit_box`, resized, antialiased.

    `Cameras.fitted` describes the same change.
    """
    old_height, old_width = image.shape[:2]
    left, top, right, bottom = fit_box(old_height, old_width, height, width)
    box = (max(left, 0.0), max(top, 0.0), min(right, old_width), min(bottom, old_height))  # rounding
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def fit_depth(depth: Tensor, height: int, width: int) -> Tensor:
    """[H0, W0] to [height, width] as in `fit_image`, but from the nearest pixel: depths must not be mixed."""
    left, top, right, bottom = fit_box(*depth.shape, height, width)
    x = left + (torch.arange(width) + 0.5) * (right - left) / width
    y = top + (torch.arange(height) + 0.5) * (bottom - top) / height
    return depth[y.long()[:, None], x.long()[None]]


# --- Lenses ---


def distorted(rays: Tensor, distortion: Tensor) -> Tensor:
    """[..., 2] where a lens puts the ray (x, y, 1): OpenCV's model with k1, k2, p1, p2 (COLMAP's OPENCV, too), k3."""
    k1, k2, p1, p2, k3 = (*distortion.unbind(-1), 0.0)[:5]
    x, y = rays.unbind(-1)
    square = x * x + y * y
    radial = 1 + square * (k1 + square * (k2 + square * k3))
    return torch.stack(
        [
            x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x),
            y * radial + 2 * p2 * x * y + p1 * (square + 2 * y * y),
        ],
        dim=-1,
    )


def undistorted_zoom(size: tuple[float, float], lens: Tensor) -> float | None:
    """How much larger the focal lengths of the undistorted image must be for it to show only what was photographed.

    size: (width, height); lens: [9] float64, fx, fy, cx, cy, k1, k2, p1, p2, k3. None where the distortion is no
    lens's: it folds the image over, or would need more than LARGEST_ZOOM.
    """
    limits = torch.tensor(size, dtype=torch.float64)
    s = torch.linspace(0, 1, 65, dtype=torch.float64)
    edges = [torch.stack([s, torch.full_like(s, end)], dim=-1) for end in (0.0, 1.0)]
    edge = torch.cat([*edges, *(e.flip(-1) for e in edges)]) * limits  # all around the image, pixels
    rays = (edge - lens[2:4]) / lens[:2]
    for zoom in torch.linspace(1, LARGEST_ZOOM, 61).tolist():
        place = distorted(rays / zoom, lens[4:]) * lens[:2] + lens[2:4]
        if ((place >= -0.5) & (place <= limits + 0.5)).all():
            break
    else:
        return None
    ring = distorted(rays / zoom * torch.linspace(0, 1, 50, dtype=torch.float64)[:, None, None], lens[4:])
    outward = ((ring[1:] - ring[:-1]) * rays).sum(-1)
    return zoom if (outward >= 0).all() else None


def undistorted(image: np.ndarray, lens: Tensor, intrinsics: Tensor) -> np.ndarray:
    """[H, W] (nearest pixel: depths) or uint8 [H, W, 3] (bilinear) as a pinhole camera sees it.

    intrinsics: [3, 3] of the pinhole camera; lens: [9] of the stored image, as in `undistorted_zoom`.
    """
    height, width = image.shape[:2]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    matrix, lens = intrinsics.float(), lens.float()
    rays = (torch.stack([x, y], dim=-1) - matrix[:2, 2]) / matrix[[0, 1], [0, 1]]
    place = distorted(rays, lens[4:]) * lens[:2] + lens[2:4]
    grid = (2 * place / place.new_tensor([width, height]) - 1)[None]
    pixels = torch.from_numpy(np.ascontiguousarray(image)).float().reshape(1, height, width, -1).permute(0, 3, 1, 2)
    mode = "bilinear" if image.ndim == 3 else "nearest"
    out = torch.nn.functional.grid_sample(pixels, grid, mode, "border", align_corners=False)[0].permute(1, 2, 0)
    if image.ndim == 2:
        return out[..., 0].numpy().astype(image.dtype)
    return out.round().clamp(0, 255).to(torch.uint8).numpy()
