"""What is found beside packages: the metrics' weights, sources of depth, renderers. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fvgen.errors import UserError
from fvgen.system.packages import install


@dataclass(frozen=True)
class Part:
    """One thing that is here or not.

    kind: "metric", "depth" or "renderer". state: "ok", "missing", or "broken". says: where it was found, or why it
    cannot be used. cure: the command, None where all is well or none will do.
    """

    kind: str
    name: str
    state: str
    says: str
    cure: str | None = None


def parts() -> list[Part]:
    """All of them. Raises what broken packages of the core raise."""
    return [*metrics(), *depths(), *renderers()]


def metrics() -> list[Part]:
    """The metrics' networks; PSNR and SSIM have none."""
    from fvgen.metrics.image import LPIPS_NETS
    from fvgen.metrics.weights import INCEPTION, SQUEEZENET

    return [
        Part("metric", "psnr, ssim", "ok", "need no weights"),
        _network("lpips", list(LPIPS_NETS), "lpips"),
        _network("fid, kid", INCEPTION, "torch_fidelity"),
        _network("kid_squeeze", SQUEEZENET),
    ]


def _network(name: str, files: Sequence[str], package: str | None = None) -> Part:
    from fvgen.metrics.weights import Unavailable, found, load_weights, require

    try:
        if package:
            require(package, name)
        path = found(files)
        if path is None:
            said = f"{files[0]} is neither in the folder FVGEN_WEIGHTS nor in torch hub's cache"
            return Part("metric", name, "missing", said, "export FVGEN_WEIGHTS=FOLDER  # or FVGEN_DOWNLOAD=1, once")
        load_weights(path)
    except Unavailable as lack:
        return Part("metric", name, "missing", str(lack), install("eval"))
    except UserError as error:
        return Part("metric", name, "broken", str(error))
    return Part("metric", name, "ok", str(path))


def depths() -> list[Part]:
    """Where points come from on a scene without depth maps; the first that can is taken."""
    from fvgen.depth.maps import not_here

    brought = {
        "dust3r": "export FVGEN_DUST3R=CHECKOUT FVGEN_DUST3R_WEIGHTS=FILE  # docs/data.md; non-commercial",
        "depth_pro": "export FVGEN_DEPTH_PRO=FOLDER  # with apple/DepthPro-hf, or FVGEN_DOWNLOAD=1, once",
    }
    rows = []
    for name, cure in brought.items():
        lack = not_here(name)
        rows.append(Part("depth", name, "missing" if lack else "ok", lack or "brought", cure if lack else None))
    return rows


def renderers() -> list[Part]:
    """What draws on a GPU besides torch, which always can; none of them is needed."""
    from fvgen.geometry.pointcloud import pytorch3d_has_cuda
    from fvgen.splats.fitting import lacks_gsplat

    gsplat = lacks_gsplat()  # the package has its cure where packages are judged
    says = "draws clouds on a GPU" if pytorch3d_has_cuda() else "not here with CUDA; the torch renderer gives the same"
    return [
        Part("renderer", "pytorch3d", "ok" if pytorch3d_has_cuda() else "missing", says),
        Part("renderer", "gsplat", "missing" if gsplat else "ok", gsplat or "draws Gaussians on a GPU"),
    ]
