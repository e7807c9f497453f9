"""Unposed photographs to a posed scene: by COLMAP's incremental structure-from-motion (pycolmap: a CPU, no weights), or
by a user's own DUSt3R, which also does with one or two photographs and brings depth maps.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fvgen.depth import dust3r
from fvgen.depth.dust3r_model import missing
from fvgen.errors import UserError, did_you_mean, first_line
from fvgen.posing.two_views import pose_pair, pose_single
from fvgen.scenes.formats import read_scene
from fvgen.scenes.readers.photographs import Photographs, copy_photograph
from fvgen.scenes.scene import Scene
from fvgen.system.files import atomic_path, new_folder, write_json
from fvgen.system.packages import install

FEWEST = 3  # views: two can be posed, but by chance
LEAST_POSED = 0.5  # share of the photographs

POSERS = ("colmap", "dust3r")
LEFT_OUT = "left_out.json"  # in the folder of a posed scene: photographs that have no pose, and why


class Posed(NamedTuple):
    """``backend``: who found the poses of the scene."""

    scene: Scene
    backend: str


def pose_photographs(
    photographs: Photographs, folder: str | Path, backend: str = "auto", in_order: bool = False
) -> Posed:
    """A posed scene in ``folder`` by one of `POSERS`; "auto": COLMAP, and DUSt3R where that fails and this is there.

    One or two photographs, too few for COLMAP, go to DUSt3R where it is there, else to `fvgen.posing.two_views`.

    ``in_order`` is for `reconstruct`. Raises UserError where none or not the given one can.
    """
    if backend not in ("auto", *POSERS):
        raise UserError(f"unknown way to pose photographs {backend!r}{did_you_mean(backend, [*POSERS, 'auto'])}")
    few, brought = len(photographs) < FEWEST, missing() is None
    if backend == "dust3r" or (backend == "auto" and brought and (few or not find_spec("pycolmap"))):
        return Posed(dust3r.reconstruct(photographs, folder), "dust3r")
    if backend == "auto" and few:
        pose = pose_pair if len(photographs) == 2 else pose_single
        return Posed(pose(photographs, folder), "two views" if len(photographs) == 2 else "one view")
    try:
        return Posed(reconstruct(photographs, folder, in_order), "colmap")
    except UserError:
        if backend == "colmap" or missing() is not None or Path(folder).exists():
            raise
        return Posed(dust3r.reconstruct(photographs, folder), "dust3r")


def reconstruct(photographs: Photographs, folder: str | Path, in_order: bool = False) -> Scene:
    """Poses, one shared lens, and sparse points; written to ``folder`` as a COLMAP scene, whole or not at all.

    ``in_order`` compares each photograph with those next to it only, for frames of a video; otherwise all are compared
    with all. Photographs that cannot be posed are left out. The scale is arbitrary. The same photographs give the same
    bits: features and matches on as many threads as torch has, the rest on one. Raises UserError where pycolmap is
    missing, and where fewer than half of the photographs, or fewer than three, could be posed.
    """
    pycolmap = import_pycolmap(f"posing photographs needs pycolmap; `{install('photos')}`, or give poses")
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} is already there; choose another folder for the reconstruction")
    with atomic_path(folder) as temporary:
        images, database, models = temporary / "images", temporary / "database.db", temporary / "models"
        for place in (images, models):
            new_folder(place)
        for path in photographs.image_paths:
            copy_photograph(path, images)
        try:
            with quiet(pycolmap):
                extract(pycolmap, database, images, pycolmap.CameraMode.SINGLE)
                match(pycolmap, database, in_order)
                found = build_models(pycolmap, database, images, models)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"COLMAP failed on {photographs.name} ({first_line(error)}); check the photographs"
            ) from error
        best = max(found.values(), key=lambda model: model.num_reg_images(), default=None)
        posed = best.num_reg_images() if best else 0
        if posed < max(FEWEST, LEAST_POSED * len(photographs)):
            raise UserError(
                f"only {posed} of the {len(photographs)} photographs of {photographs.name} could be posed; take "
                "more of them, with more overlap and from different places (at least "
                f"{max(FEWEST, math.ceil(LEAST_POSED * len(photographs)))} must be posed), or bring DUSt3R "
                "(FVGEN_DUST3R, docs/data.md)"
            )
        new_folder(temporary / "sparse" / "0")
        best.write(temporary / "sparse" / "0")
        left_out = _left_out(pycolmap, database, {image.name for image in best.images.values() if image.has_pose})
        write_json(temporary / LEFT_OUT, left_out)
        shutil.rmtree(models)
        for left in [database, *temporary.glob("database.db-*")]:
            left.unlink(missing_ok=True)
    return read_scene(folder, "colmap")


# --- COLMAP's steps: random numbers are seeded everywhere; where sums are threaded there is one thread ---


def import_pycolmap(lack: str) -> ModuleType:
    """Raises UserError, saying ``lack``, where it is not installed."""
    try:
        import pycolmap
    except ImportError as error:
        raise UserError(lack) from error
    return pycolmap


def extract(pycolmap: ModuleType, database: Path, images: Path, mode: Any, contrast: float | None = None) -> None:
    """Features of all images; ``mode``: which of them share a lens; ``contrast``: the least, COLMAP's own if None."""
    pycolmap.set_random_seed(0)
    options = pycolmap.FeatureExtractionOptions()
    options.num_threads, options.use_gpu = torch.get_num_threads(), False
    if contrast is not None:
        options.sift.peak_threshold = contrast
    pycolmap.extract_features(database, images, camera_mode=mode, extraction_options=options)


def match(pycolmap: ModuleType, database: Path, in_order: bool = False) -> None:
    """Matches that some two cameras explain, of all pairs or of neighbours."""
    options, geometry = pycolmap.FeatureMatchingOptions(), pycolmap.TwoViewGeometryOptions()
    options.num_threads, options.use_gpu = torch.get_num_threads(), False
    geometry.ransac.random_seed = 0
    run = pycolmap.match_sequential if in_order else pycolmap.match_exhaustive
    run(database, matching_options=options, verification_options=geometry)


def build_models(
    pycolmap: ModuleType, database: Path, images: Path, models: Path, fewest: int | None = None
) -> dict[int, Any]:
    """Reconstructions, each of views that hang together. ``fewest``: points that place a view through a lens that is
    known and stays as it is, twice as many the first two; None: COLMAP's own numbers, and lenses are estimated."""
    mapping = pycolmap.IncrementalPipelineOptions()
    mapping.num_threads = mapping.mapper.num_threads = 1
    mapping.random_seed = mapping.mapper.random_seed = mapping.triangulation.random_seed = 0
    mapping.ba_use_gpu = False
    if fewest is not None:
        mapping.ba_refine_focal_length = mapping.ba_refine_extra_params = False
        mapping.mapper.abs_pose_min_num_inliers, mapping.mapper.init_min_num_inliers = fewest, 2 * fewest
        mapping.min_model_size = FEWEST
    return pycolmap.incremental_mapping(database, images, models, mapping)


def _left_out(pycolmap: ModuleType, database: Path, placed: set[str]) -> dict[str, str]:
    """Names of the images without a pose, and why."""
    with pycolmap.Database.open(database) as found:
        names = {image.image_id: image.name for image in found.read_all_images()}
        most = dict.fromkeys(names.values(), 0)
        pairs, geometries = found.read_two_view_geometries()
        for pair, geometry in zip(pairs, geometries, strict=True):
            for number in pycolmap.pair_id_to_image_pair(pair):
                most[names[number]] = max(most[names[number]], len(geometry.inlier_matches))
    return {
        name: f"at most {count} points in common with another photograph" if count else "nothing in common with another"
        for name, count in most.items()
        if name not in placed
    }


@contextmanager
def quiet(pycolmap: ModuleType) -> Iterator[None]:
    """Without COLMAP's lines about each image on stderr; what fails it tells by exceptions and empty results."""
    before = pycolmap.logging.minloglevel
    pycolmap.logging.minloglevel = int(pycolmap.logging.Level.FATAL)
    try:
        yield
    finally:
        pycolmap.logging.minloglevel = before
