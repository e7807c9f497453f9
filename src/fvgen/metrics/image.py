"""Metrics of one predicted image against its true one: PSNR, SSIM, LPIPS.

Images are [N, 3, H, W] in [0, 1], and one value per image comes back, [N]. Nothing is resized.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fvgen.metrics import weights
from fvgen.metrics.weights import Unavailable, building, load_weights, locate, require, unusable

PSNR_CEILING = 100.0  # dB; identical images would otherwise make every mean infinite
SSIM_WINDOW = 11  # pixels
NETWORK_MINIMUM = 32  # pixels; below this the backbones' last poolings have nothing left to pool
BATCH = 32
LPIPS_NETS = {  # in the order of preference
    **dict.fromkeys(weights.SQUEEZENET, "squeeze"),
    **dict.fromkeys(weights.ALEXNET, "alex"),
    **dict.fromkeys(weights.VGG16, "vgg"),
}


def psnr(predicted: Tensor, truth: Tensor, shown: Tensor | None = None) -> Tensor:
    """[N] peak signal-to-noise ratio in dB, -10 log10(MSE) of each image, at most 100 dB.

    shown: [N, H, W] bool, the pixels that count, at least one of each image; all if not given. Averaging over images is
    the convention in novel-view synthesis; the PSNR of the pooled error is lower.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    check_images(predicted, truth)
    if shown is not None:
        errors = (predicted.float() - truth.float()).square().mean(dim=1)
        return (-10 * mean_where(errors, shown).log10()).clamp(max=PSNR_CEILING)
    value = peak_signal_noise_ratio(predicted.float(), truth.float(), 1.0, reduction="none", dim=(1, 2, 3))
    return value.clamp(max=PSNR_CEILING)


def ssim(predicted: Tensor, truth: Tensor, shown: Tensor | None = None) -> Tensor:
    """[N] structural similarity, at most 1 (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5.

    Computed per colour channel and averaged over all pixels, the border mirrored as torchmetrics does. In
    float64: in flat regions float32 leaves too little of the variances. ``shown`` as in `psnr`: the windows around the
    other pixels are left out, but those of shown pixels reach into them.
    Raises Unavailable when the images are smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    check_images(predicted, truth)
    require_size(predicted, SSIM_WINDOW, "SSIM's window")
    options = {"sigma": 1.5, "kernel_size": SSIM_WINDOW, "data_range": 1.0, "reduction": "none"}
    parts = zip(predicted.double().split(BATCH), truth.double().split(BATCH), strict=True)
    if shown is not None:
        maps = [structural_similarity_index_measure(p, t, **options, return_full_image=True)[1] for p, t in parts]
        return mean_where(torch.cat(maps).mean(dim=1), shown).float()
    values = [structural_similarity_index_measure(p, t, **options) for p, t in parts]
    return torch.cat([value.reshape(-1) for value in values]).float()  # torchmetrics drops the axis of a single image


@torch.no_grad()
def lpips(predicted: Tensor, truth: Tensor) -> tuple[Tensor, str]:
    """[N] learned perceptual distance (Zhang et al. 2018), version 0.1, and its backbone's name.

    The backbone is the first of squeeze, alex, vgg whose weights are at hand (see `weights.locate`); values
    of different backbones, or of different image sizes, cannot be compared.
    Raises Unavailable when the package or every backbone's weights are not to be had, or the images are smaller than
    32 pixels.
    """
    check_images(predicted, truth)
    require_size(predicted, NETWORK_MINIMUM, "what LPIPS's networks can pool")
    network, name = lpips_network(predicted.device)
    parts = zip(predicted.float().split(BATCH), truth.float().split(BATCH), strict=True)
    return torch.cat([network(p, t, normalize=True).reshape(-1) for p, t in parts]), name


def lpips_network(device: torch.device | str = "cpu") -> tuple[nn.Module, str]:
    """The `lpips` package's network with real backbone weights, and the backbone's name. Raises Unavailable without
    either."""
    require("lpips", "LPIPS")
    from lpips import LPIPS

    path = locate(list(LPIPS_NETS))
    state, name = load_weights(path), LPIPS_NETS[path.name]
    with building():  # pnet_rand keeps the package from downloading; every backbone weight is replaced below
        network = LPIPS(net=name, pnet_rand=True, verbose=False)
    try:
        # "slice3.6.weight" there is "features.6.weight" in torchvision's naming
        backbone = {key: state["features." + key.split(".", 1)[1]] for key in network.net.state_dict()}
        network.net.load_state_dict(backbone)
    except (KeyError, RuntimeError) as error:
        raise unusable(path, error) from error
    return network.to(device).eval().requires_grad_(False), name


def mean_where(values: Tensor, shown: Tensor) -> Tensor:
    """[N] of values [N, H, W]: the mean over the pixels that are shown."""
    return torch.where(shown, values, 0.0).sum(dim=(1, 2)) / shown.sum(dim=(1, 2))


def check_images(predicted: Tensor, truth: Tensor) -> None:
    """Assert the shapes and the value range that every metric relies on."""
    assert predicted.shape == truth.shape and predicted.ndim == 4 and predicted.shape[1] == 3, (
        predicted.shape,
        truth.shape,
    )
    for images in (predicted, truth):
        assert images.min() >= 0 and images.max() <= 1, "images must lie in [0, 1]: clamp what a decoder returns"


def require_size(images: Tensor, minimum: int, what: str) -> None:
    """Raise Unavailable when an image side is shorter than ``minimum`` pixels."""
    height, width = images.shape[-2:]
    if min(height, width) < minimum:
        raise Unavailable(f"images of {height}x{width} pixels are smaller than {what}, {minimum}x{minimum}")
