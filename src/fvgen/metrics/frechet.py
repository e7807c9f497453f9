"""Distances between two sets of images, from a network's features: FID, KID, and a SqueezeNet MMD.

Images are [N, 3, H, W] in [0, 1]; each distance is one number, and smaller is nearer. FID and KID are known
by their network: Inception v3 with the original TensorFlow weights. With any other features the number gets
another name, here `kid_squeeze`, and may be compared only with itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fvgen.metrics.image import BATCH, NETWORK_MINIMUM, require_size
from fvgen.metrics.weights import INCEPTION, SQUEEZENET, Unavailable, building, load_weights, locate, require, unusable

KID_SUBSET = 1000  # images per subset and subsets, as in the KID paper; fewer images make one subset of all of them
KID_SUBSETS = 100
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def fid(predicted: Tensor, truth: Tensor) -> float:
    """Fréchet Inception distance (Heusel et al. 2017).

    Biased upwards when N is small (below 2048 images the covariances are singular): give N beside it.
    Raises Unavailable without Inception's weights or with fewer than two images.
    """
    return frechet_distance(inception_features(predicted), inception_features(truth))


def kid(predicted: Tensor, truth: Tensor) -> float:
    """Kernel Inception distance (Binkowski et al. 2018): unbiased, hence sometimes slightly negative.

    Raises Unavailable without Inception's weights or with fewer than two images.
    """
    return kernel_distance(inception_features(predicted), inception_features(truth))


def kid_squeeze(predicted: Tensor, truth: Tensor) -> float:
    """Squared MMD of SqueezeNet features: 0 for equal sets, at most 16. Neither KID nor comparable with it.

    KID's cubic kernel on `squeeze_features`, but the biased estimate, all pairs included. The unbiased one
    assumes independent sets and goes negative where each prediction belongs to one true image, as ours do.
    Raises Unavailable without SqueezeNet's weights or when the images are smaller than 32 pixels.
    """
    return squeeze_distance(squeeze_features(predicted), squeeze_features(truth))


def squeeze_distance(predicted: Tensor, truth: Tensor) -> float:
    """`kid_squeeze` of features [N, 512] that are there already."""
    x, y = predicted.double(), truth.double()
    return (_mean_kernel(x, x) + _mean_kernel(y, y) - 2 * _mean_kernel(x, y)).item()


@torch.no_grad()
def inception_features(images: Tensor) -> Tensor:
    """[N, 2048] features behind FID and KID; torchmetrics resizes to 299x299 with antialiasing.

    Raises Unavailable without the package torch-fidelity or Inception's weights.
    """
    require("torch_fidelity", "Inception")
    from torchmetrics.image.fid import NoTrainInceptionV3

    path = locate(INCEPTION)
    load_weights(path)  # refuses a damaged or unsafe file first, because the next line unpickles whatever it finds
    with building():
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path)).to(images.device)
    return torch.cat([network((part * 255).round().byte()).cpu() for part in images.split(BATCH)])


@torch.no_grad()
def squeeze_features(images: Tensor) -> Tensor:
    """[N, 512] SqueezeNet 1.1 features: last layer before the classifier, image average, scaled to length 1.

    The images keep their size. The length is divided out because these features, unlike Inception's, have
    lengths in the hundreds, where a cubic kernel would see little but the largest of them.
    """
    from torchvision.models import squeezenet1_1

    require_size(images, NETWORK_MINIMUM, "what SqueezeNet can pool")
    path = locate(SQUEEZENET)
    with building():
        network = squeezenet1_1()
    try:
        network.load_state_dict(load_weights(path))
    except RuntimeError as error:
        raise unusable(path, error) from error
    network = network.features.to(images.device).eval()
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    parts = ((images - mean) / std).float().split(BATCH)
    return normalize(torch.cat([network(part).mean(dim=(2, 3)).cpu() for part in parts]), dim=1)


def frechet_distance(predicted: Tensor, truth: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features [N, D], in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    _require_two(predicted)
    metric = FrechetInceptionDistance(feature=_Given(predicted.shape[1]))
    return _compare(metric, predicted, truth).item()


def kernel_distance(predicted: Tensor, truth: Tensor) -> float:
    """Squared MMD of features [N, D] with the kernel (x.y / D + 1)^3, unbiased, in float64.

    Above 1000 images, the mean over 100 random subsets of 1000, drawn with a fixed seed.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    _require_two(predicted)
    count = predicted.shape[0]
    subsets = KID_SUBSETS if count > KID_SUBSET else 1
    with building():  # torchmetrics draws its subsets from the global generator
        torch.manual_seed(0)
        metric = KernelInceptionDistance(_Given(predicted.shape[1]), subsets, min(count, KID_SUBSET))
        return _compare(metric, predicted, truth)[0].item()


def _mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Mean over all pairs of (cosine + 1)^3, which is KID's kernel for vectors of length sqrt(D)."""
    return (x @ y.T + 1).pow(3).mean()


class _Given(nn.Identity):
    """The feature extractor for features that are already there."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _compare(metric: nn.Module, predicted: Tensor, truth: Tensor) -> Tensor:
    metric.update(truth.double(), real=True)
    metric.update(predicted.double(), real=False)
    return metric.compute()


def _require_two(features: Tensor) -> None:
    if features.shape[0] < 2:
        raise Unavailable("a distance between sets of images needs at least two images in each")
