"""RealEstate10K and ACID: a camera file per clip, and frames that the user took from the videos.

Source: google.github.io/realestate10k, "Data format"; ACID (infinite-nature) uses the same. The frames of clip NAME.txt
are image files named by the camera file's timestamps, in microseconds.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from fvgen.errors import UserError
from fvgen.geometry.conventions import from_realestate10k
from fvgen.scenes.images import image_size
from fvgen.scenes.scene import Frame, Scene, posed_scene
from fvgen.system.doors import read_text

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def camera_file(folder: Path) -> Path | None:
    """The camera file of a folder of frames: NAME/NAME.txt, or NAME.txt beside the folder NAME; None if neither is."""
    name = folder.resolve().name + ".txt"
    return next((file for file in (folder / name, folder.resolve().parent / name) if file.is_file()), None)


def read_realestate10k(folder: Path, images: str | None = None) -> Scene:
    """The frames in ``folder`` (or its sub-folder ``images``) that the camera file lists, in its order.

    Lines of the camera file without a frame are left out, for videos lose frames; an image without a line is not read.
    Poses are in the data set's own scale.
    """
    if images not in (None, "images"):
        raise UserError(f"{folder}: RealEstate10K and ACID have no {images}; leave out the choice of images")
    file = camera_file(folder)
    if file is None:
        name = folder.resolve().name
        raise UserError(f"{folder} has no camera file {name}.txt in it or beside it; copy it from the data set there")
    text = read_text(file, errors="replace", cure="check its permissions")
    place = folder / "images" if (folder / "images").is_dir() else folder
    stored = {path.stem: path for path in sorted(place.iterdir()) if path.suffix.lower() in SUFFIXES}
    try:
        timestamps, cameras = from_realestate10k(text, 1, 1)
    except ValueError as error:
        raise UserError(f"camera file {file}: {error}; copy it again from the data set") from error
    if repeated := Counter(timestamps) - Counter(set(timestamps)):
        raise UserError(f"camera file {file} lists the timestamp {min(repeated)} twice; remove one of its lines")
    there = [view for view, timestamp in enumerate(timestamps) if str(timestamp) in stored]
    if not there:
        raise UserError(
            f"none of the {len(timestamps)} frames of {file} is in {place}; take them from the video and name each "
            f"by its timestamp, such as {timestamps[0]}.png"
        )
    frames = []
    for view in there:
        image = stored[str(timestamps[view])]
        width, height = image_size(image)
        matrix = cameras.intrinsics[view]  # for an image of 1 x 1, so in fractions of the size
        frames.append(
            Frame(
                f"{file} timestamp {timestamps[view]}",
                image,
                (width, height),
                (matrix[0, 0].item() * width, matrix[1, 1].item() * height),
                (matrix[0, 2].item() * width, matrix[1, 2].item() * height),
                cameras.world_from_cam[view],
            )
        )
    return posed_scene(folder, frames)
