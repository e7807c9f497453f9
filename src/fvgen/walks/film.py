"""Videos as files: H.264 in mp4, by PyAV."""

from __future__ import annotations

from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from fvgen.clips.clip import to_bytes
from fvgen.errors import UserError
from fvgen.system.files import atomic_path
from fvgen.system.packages import install

QUALITY = "16"  # x264's constant rate factor: hardly to be told from the frames


def judge_film() -> None:
    """Raises UserError where videos cannot be written."""
    if not find_spec("av"):
        raise UserError(f"writing video.mp4 needs PyAV; `{install('photos')}`")


def write_film(path: Path, frames: Tensor, fps: int) -> None:
    """Frames [F, 3, H, W] in [0, 1], H and W even; the same bytes each time."""
    import av

    options = {"fflags": "+bitexact"}
    with atomic_path(path) as temporary, av.open(str(temporary), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": QUALITY, "threads": "1", "flags": "+bitexact"}
        for image in to_bytes(frames).permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
