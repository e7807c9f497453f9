"""What a visitor may send: how many photographs, how large, of which kinds, and under which names they are kept.

Nothing is believed that a browser says of a file: its kind is told by its first bytes, its size by its header, and its
name loses whatever could be a path. Pixels are not decoded here.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvgen.errors import UserError, short
from fvgen.scenes.images import image_size, register_heic
from fvgen.system.doors import problem, stream
from fvgen.walks.given import MOST

HEAD = 32  # bytes that tell a kind
LONGEST_NAME = 60  # characters
MOST_BODY = 1 << 20  # bytes of a request that is no upload
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


@dataclass(frozen=True)
class Limits:
    """photographs: at most so many. file_bytes, all_bytes: of one and of all. pixels, all_pixels: the same of what they
    decode to. frame_pixels: of a frame that is asked for. folder_bytes: of all that visitors have sent and not
    taken away. minutes: of one job."""

    photographs: int = MOST
    file_bytes: int = 32 << 20
    all_bytes: int = 256 << 20
    pixels: int = 64_000_000
    all_pixels: int = 1_000_000_000
    frame_pixels: int = 1080 * 1920
    folder_bytes: int = 8 << 30
    minutes: float = 30.0


def kind_of(head: bytes) -> str | None:
    """The suffix of a photograph that begins with these bytes; None for all else."""
    if head.startswith(b"\xff\xd8\xff"):
        return ".jpg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return ".webp"
    if head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS:
        return ".heic"
    return None


def safe_name(name: str, kind: str, taken: Sequence[str] = ()) -> str:
    """The last part of a name with letters, digits, dots, dashes and blanks only, the suffix of its ``kind``, and none
    that is ``taken`` (letter cases are one: some file systems do not tell them apart)."""
    stem = unicodedata.normalize("NFC", re.split(r"[/\\]", name)[-1])
    stem = re.sub(r"\.[A-Za-z0-9]{1,5}$", "", stem)
    stem = re.sub(r"[^\w. -]", "_", stem).strip(" ._-")[:LONGEST_NAME].rstrip(" ._-") or "photograph"
    low, count, found = {each.lower() for each in taken}, 2, stem + kind
    while found.lower() in low:
        found, count = f"{stem}-{count}{kind}", count + 1
    return found


def judge_uploads(files: Sequence[Path], folder: Path, limits: Limits) -> list[str]:
    """The names under which these uploads may be kept, in their order.

    folder: where uploads lie; what is elsewhere was not uploaded. Raises UserError, one sentence with the name of the
    file, for the first that is too large, no photograph, or cannot be read.
    """
    if not files:
        raise UserError("no photographs were given; drop two or more that overlap, or choose an example")
    if len(files) > limits.photographs:
        raise UserError(f"{len(files)} photographs are more than {limits.photographs}; drop fewer")
    place, names, size, pixels = folder.resolve(), [], 0, 0
    for file in files:
        if place not in file.resolve().parents or problem(file):
            raise UserError(f"{short(file.name)} was not uploaded to this page, or is gone; drop it again")
        size += file.stat().st_size
        names.append(_judge(file, names, limits))
        pixels += _pixels(file, names[-1], limits)
    if size > limits.all_bytes:
        raise UserError(f"these photographs have {_mb(size)} together, of at most {_mb(limits.all_bytes)}; drop fewer")
    if pixels > limits.all_pixels:
        most = f"{limits.all_pixels / 1e6:.0f}"
        raise UserError(f"these photographs have {pixels / 1e6:.0f} megapixels together, of at most {most}; drop fewer")
    return names


def _judge(file: Path, taken: Sequence[str], limits: Limits) -> str:
    size = file.stat().st_size
    if size > limits.file_bytes:
        raise UserError(f"{short(file.name)} has {_mb(size)}, of at most {_mb(limits.file_bytes)}; make it smaller")
    with stream(file) as opened:
        kind = kind_of(opened.read(HEAD))
    if kind is None:
        what = "is empty" if size == 0 else "is no photograph by its first bytes"
        raise UserError(f"{short(file.name)} {what}; give JPEG, PNG, WebP or HEIC")
    return safe_name(file.name, kind, taken)


def _pixels(file: Path, name: str, limits: Limits) -> int:
    """By the header, as its kind's own decoder reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's own of many pixels: they are counted below
        try:
            if name.endswith(".heic"):  # whatever the browser called it
                register_heic(file)
            width, height = image_size(file, posed=False)
        except UserError as error:  # about the path on this machine, which is nobody's business
            reason = str(error).removeprefix(f"image {file} ").replace(str(file), name).split(";")[0]
            reason = re.sub(r" \([^()]*[/\\][^()]*\)?", "", reason)  # what is left of the path where it was shortened
            raise UserError(f"{name} {reason}; save it again, or as JPEG") from error
    if width * height > limits.pixels:
        most = f"{limits.pixels / 1e6:.0f}"
        raise UserError(f"{name} is {width}x{height}, more than {most} megapixels; make it smaller")
    return width * height


def _mb(size: int) -> str:
    return f"{size / (1 << 20):.0f} MB"


def names_an_address(value: Any) -> bool:
    """Whether a request's JSON calls a file (Gradio's FileData) by an address: the page would fetch it."""
    if isinstance(value, dict):
        path = value.get("path")
        return (isinstance(path, str) and "://" in path) or any(map(names_an_address, value.values()))
    return isinstance(value, list) and any(map(names_an_address, value))
