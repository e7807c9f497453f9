"""Where the metrics' networks come from: the folder FVGEN_WEIGHTS, torch hub's cache, or a download.

Nothing here downloads unasked or hands out random weights: what cannot be had raises `Unavailable`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from fvgen.errors import UserError
from fvgen.system.files import new_folder
from fvgen.system.packages import install
from fvgen.system.places import sha256_of
from fvgen.system.weights import DAMAGE, read_weights_file

TORCHVISION = "https://download.pytorch.org/models/"
TORCH_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"

# File names are the publishers' own; the fp16 one is the same SqueezeNet at half the size.
SQUEEZENET = ("squeezenet1_1_fp16.safetensors", "squeezenet1_1-b8a52dc0.pth")
ALEXNET = ("alexnet-owt-7be5be79.pth",)
VGG16 = ("vgg16-397923af.pth",)
INCEPTION = ("weights-inception-2015-12-05-6726825d.pth",)
ADDRESSES = {
    "squeezenet1_1-b8a52dc0.pth": TORCHVISION,
    "alexnet-owt-7be5be79.pth": TORCHVISION,
    "vgg16-397923af.pth": TORCHVISION,
    "weights-inception-2015-12-05-6726825d.pth": TORCH_FIDELITY,
}


class Unavailable(UserError):
    """A metric that has no value here; the message is the reason, one sentence, fit for a report."""


def found(names: Sequence[str]) -> Path | None:
    """The first file of ``names`` in the folder FVGEN_WEIGHTS, then in torch hub's cache; nothing is downloaded.

    Raises UserError when FVGEN_WEIGHTS names no folder.
    """
    for folder in [*_named_folder(), _cache()]:
        for name in names:
            if (folder / name).is_file():
                return folder / name
    return None


def locate(names: Sequence[str]) -> Path:
    """`found`, or, where there is none and the environment says FVGEN_DOWNLOAD=1, the first name with a known address,
    downloaded into torch hub's cache. Raises Unavailable otherwise."""
    if (path := found(names)) is not None:
        return path
    if os.environ.get("FVGEN_DOWNLOAD") != "1":
        raise Unavailable(
            f"the weights {' or '.join(names)} are neither in the folder FVGEN_WEIGHTS nor in torch hub's "
            "cache; put them there, or set FVGEN_DOWNLOAD=1 to allow their download"
        )
    return _download(next(name for name in names if name in ADDRESSES), _cache())


def require(package: str, what: str) -> None:
    """Raises Unavailable, saying ``what`` needs it, where a package of the extra `eval` is not installed."""
    if find_spec(package) is None:
        raise Unavailable(f"{what} needs the package {package}; `{install('eval')}`")


def load_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in ``path``, floats as float32: .safetensors, or .pth read without running pickled code.

    Raises UserError when the file is cut short or does not match the SHA-256 digits in its own name.
    """
    try:
        if path.suffix != ".safetensors":
            _check_digest(path)
        state = read_weights_file(path)
    except DAMAGE as error:
        raise unusable(path, error) from error
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def unusable(path: Path, error: Exception) -> UserError:
    """The sentence for a weights file that exists but cannot be used."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
    return UserError(f"weights file {path} cannot be used ({reason}); replace it with an intact one or remove it")


@contextmanager
def building() -> Iterator[None]:
    """For building a network that is filled afterwards: its random start and its warnings leave no trace."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _cache() -> Path:
    """torch hub's."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _named_folder() -> list[Path]:
    name = os.environ.get("FVGEN_WEIGHTS")
    if not name:
        return []
    if not Path(name).is_dir():
        raise UserError(f"FVGEN_WEIGHTS names {name}, which is not a folder; correct or unset the variable")
    return [Path(name)]


def _download(name: str, folder: Path) -> Path:
    target = folder / name
    try:
        new_folder(folder)
        torch.hub.download_url_to_file(ADDRESSES[name] + name, str(target), hash_prefix=_digest_in(name))
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"the download of {name}, allowed by FVGEN_DOWNLOAD=1, failed ({error})") from error
    return target


def _digest_in(name: str) -> str:
    """The leading SHA-256 digits that the publishers put at the end of a file name."""
    found = re.search(r"-([0-9a-f]{8,})\.pth$", name)
    assert found, name
    return found.group(1)


def _check_digest(path: Path) -> None:
    digest = sha256_of(path)
    if not digest.startswith(_digest_in(path.name)):
        raise ValueError(f"its SHA-256 starts with {digest[:8]}")
