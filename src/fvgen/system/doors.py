"""The doors: the only place that opens files to read them. `tests/test_doors.py` holds everybody else to that.

What comes in is judged here once: a regular file (a pipe or a device would never end), no larger than such a file can
be, no deeper than Python can read, nothing in it ever run. A refusal is `Unreadable`, one sentence for the user, whose
``reason`` others may put into a sentence of their own. What a file of some kind has to hold is for its reader to say.
"""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, TYPE_CHECKING, Any

from fvgen.errors import UserError, first_line, short

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from safetensors import safe_open
    from torch import Tensor

MOST_BYTES = 1 << 30  # of a file that is read whole: the index of a million clips has half of that
MOST_YAML = 1 << 20
MOST_NODES = 20_000  # of a YAML file once its aliases are written out
COPY_AGAIN = "copy it again"

NUMBERS = ("F64", "F32", "F16", "BF16")
"""Types of weights as safetensors calls them."""


class Unreadable(UserError):
    """``path`` is no file of its kind, for this ``reason``."""

    def __init__(self, path: object, reason: str, cure: str = COPY_AGAIN, what: str = "") -> None:
        super().__init__(f"{what}{' ' if what else ''}{path} cannot be read ({reason}); {cure}")
        self.reason = reason

    def __reduce__(self) -> tuple:
        return UserError, (str(self),)  # to other processes


# --- Files ---


def problem(path: str | Path) -> str | None:
    """Why a path is no regular file that can be opened; None where it is one. Nothing is opened."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return error.strerror or type(error).__name__
    except ValueError as error:  # a null character
        return first_line(error)
    if stat.S_ISDIR(mode):
        return "it is a folder, not a file"
    if not stat.S_ISREG(mode):
        return "it is a pipe, a socket or a device, not a file"
    return None if os.access(path, os.R_OK) else "Permission denied"


def there(path: str | Path) -> bool:
    """Whether anything is at a path, of whatever kind; false for a name that cannot be one."""
    return os.path.exists(path)


def regular(path: str | Path, cure: str = COPY_AGAIN, what: str = "") -> Path:
    """The path of a regular file. Raises Unreadable for anything else, and for a file that must not be read."""
    if reason := problem(path):
        raise Unreadable(path, reason, cure, what)
    return Path(path)


def stream(path: str | Path, cure: str = COPY_AGAIN) -> IO[bytes]:
    """A regular file, open for reading in pieces."""
    try:
        return regular(path, cure).open("rb")
    except OSError as error:
        raise Unreadable(path, error.strerror or first_line(error), cure) from error


def read_bytes(path: str | Path, most: int = MOST_BYTES, cure: str = COPY_AGAIN, what: str = "") -> bytes:
    """All of a regular file of at most ``most`` bytes."""
    try:
        with regular(path, cure, what).open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise Unreadable(path, error.strerror or first_line(error), cure, what) from error
    if len(data) > most:
        raise Unreadable(path, f"it has more than {most >> 20} MB", cure, what)
    return data


def read_text(
    path: str | Path, most: int = MOST_BYTES, cure: str = COPY_AGAIN, errors: str = "strict", what: str = ""
) -> str:
    """UTF-8, byte-order mark or none."""
    try:
        return read_bytes(path, most, cure, what).decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise Unreadable(path, "it is no text in UTF-8", cure, what) from error


def packaged_text(package: str, name: str) -> str:
    """A text that ships with fvgen."""
    return files(package).joinpath(name).read_text(encoding="utf-8")


# --- JSON and YAML ---


def parse_json(text: str | bytes, path: object, cure: str = COPY_AGAIN) -> Any:
    """The value of a JSON text; ``path``: where it stands."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise Unreadable(path, "it is nested too deeply", cure) from error
    except ValueError as error:  # also a number of more digits than Python reads
        raise Unreadable(path, f"it is no valid JSON: {first_line(error)}", cure) from error


def read_json(path: str | Path, cure: str = COPY_AGAIN) -> Any:
    """The value in a JSON file, byte-order mark or none."""
    return parse_json(read_text(path, cure=cure), path, cure)


def read_object(path: str | Path, cure: str = COPY_AGAIN) -> dict[str, Any]:
    """The object in a JSON file."""
    value = read_json(path, cure)
    if not isinstance(value, dict):
        raise Unreadable(path, f"it holds {_kind(value)} in place of names and values", cure)
    return value


def read_rows(path: str | Path, cure: str = COPY_AGAIN) -> list[dict[str, Any]]:
    """The objects of a file with one a line (separated by line feeds alone: a text may hold U+2028)."""
    rows = []
    for number, line in enumerate(read_text(path, cure=cure).split("\n"), 1):
        if line:
            row = parse_json(line, f"line {number} of {path}", cure)
            if not isinstance(row, dict):
                raise Unreadable(f"line {number} of {path}", f"it holds {_kind(row)}", cure)
            rows.append(row)
    return rows


def parse_yaml(text: str, path: object, cure: str = COPY_AGAIN) -> Any:
    """The value of a YAML text. Tags that would build objects are refused, and so are aliases that grow a few lines
    into gigabytes."""
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _nodes(node, {}) > MOST_NODES:
                raise Unreadable(path, f"it stands for more than {MOST_NODES} values", cure)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except UserError:
        raise
    except RecursionError as error:
        raise Unreadable(path, "it is nested too deeply", cure) from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # the last three: dates and keys
        raise Unreadable(path, first_line(error), cure) from error


def read_yaml(path: str | Path, cure: str = COPY_AGAIN, what: str = "") -> Any:
    """The value in a YAML file."""
    text = read_text(path, MOST_YAML, cure, what=what)
    try:
        return parse_yaml(text, path, cure)
    except Unreadable as error:
        raise Unreadable(path, error.reason, cure, what) from error


def _nodes(node: Any, counted: dict[int, int]) -> int:
    """How many values a YAML node stands for, aliases written out; more than there may be for one that holds itself."""
    if id(node) in counted:
        return counted[id(node)]
    counted[id(node)] = MOST_NODES + 1  # until it is known: a node inside itself has no end
    parts = node.value if isinstance(node.value, list) else []
    inner = [part for entry in parts for part in (entry if isinstance(entry, tuple) else (entry,))]
    counted[id(node)] = 1 + sum(_nodes(part, counted) for part in inner)
    return counted[id(node)]


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")


# --- Weights ---


def open_tensors(path: str | Path, cure: str = COPY_AGAIN) -> safe_open:
    """A `.safetensors` file, of which nothing but the header is read yet."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(regular(path, cure)), framework="pt")
    except (SafetensorError, OSError) as error:
        raise Unreadable(path, _of_weights(Path(path), error), cure) from error


def load_tensors(path: str | Path, cure: str = COPY_AGAIN) -> dict[str, Tensor]:
    """{name: tensor} of a `.safetensors` file, on the CPU."""
    from safetensors import SafetensorError

    try:
        with open_tensors(path, cure) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError) as error:
        raise Unreadable(path, _of_weights(Path(path), error), cure) from error


def load_pickle(path: str | Path, allowed: Sequence[type] = (), mapped: bool | None = None) -> Any:
    """What torch.save wrote: tensors and plain containers on the CPU, views of the file's memory map where it is a zip.

    ``allowed``: classes besides torch's own that it may hold. They are built, so name only harmless ones. Raises what
    torch raises for a file that is cut short, holds code or is something else: see `fvgen.system.weights.DAMAGE`.
    """
    import torch

    path = regular(path)
    is_zip = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if file.read(2) == b"PK" and not is_zip:
            raise EOFError("it is cut short")
    with torch.serialization.safe_globals(list(allowed)):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip if mapped is None else mapped)


def read_state(path: str | Path, cure: str = COPY_AGAIN) -> Any:
    """What torch.save wrote."""
    try:
        return load_pickle(path)
    except UserError:
        raise
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, UnpicklingError) as e:
        raise Unreadable(path, first_line(e), cure) from e


def plain_tensors(named: Mapping[Any, Any]) -> str | None:
    """What is wrong with a dictionary that should hold weights by name, in words; None for nothing.

    Names are texts, tensors dense, on the CPU and of floating-point numbers of at least 16 bits.
    """
    import torch

    for name, tensor in named.items():
        if not isinstance(name, str):
            return f"a name is {short(name)}, no text"
        if not isinstance(tensor, torch.Tensor):
            return f"{short(name)} is no tensor"
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            return f"{short(name)} is no plain tensor with values"
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            return f"{short(name)} is {str(tensor.dtype).removeprefix('torch.')}, no weights"
    return None


def not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a NaN or an infinity; one pass over each, without copies."""
    for name, tensor in named:
        if tensor.is_floating_point() and tensor.numel() and not _finite(tensor.detach()):
            return name
    return None


def _finite(tensor: Tensor) -> bool:
    import torch

    low, high = torch.aminmax(tensor)  # NaN where there is any
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _of_weights(path: Path, error: Exception) -> str:
    return other_kind(path) or first_line(error)


def other_kind(path: Path) -> str | None:
    """What a file is by its first bytes, and the cure, where that is a usual mistake; None for all others.

    "git clone" without git-lfs leaves pointers, a browser or `wget` saves pages in place of files.
    """
    if problem(path):
        return None
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file; run `git lfs pull` or download the file itself"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not the file; use the download link, and log in where the site asks for it"
    return None


# --- Pictures ---


def open_image(path: str | Path) -> Image:
    """A picture of which the header is read; raises whatever PIL's decoders raise on damaged bytes."""
    from PIL import Image

    return Image.open(regular(path))


def open_video(path: str | Path) -> Any:
    """PyAV's container; raises its errors on damaged bytes, and ImportError without PyAV."""
    import av

    return av.open(str(regular(path)))


def open_array(path: str | Path) -> np.ndarray:
    """The numbers of a .npy file, mapped; pickles in it are not run. Raises NumPy's errors."""
    import numpy as np

    return np.load(regular(path), mmap_mode="r", allow_pickle=False)
