"""Shards whose checksums are right and whose content is not: refused with the file's name, by whoever reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import refusal
from safetensors import safe_open
from safetensors.torch import save_file

from fvgen.distill import run as distill
from fvgen.shards.reader import ShardSet
from fvgen.system.places import sha256_of


def rewritten(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the tensors of the first shard, and make its index say that all is well."""
    file, index = sorted(folder.glob("shard-*"))[0], folder / "part-1-of-1.json"
    with safe_open(file, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata)
    part = json.loads(index.read_text())
    part["shards"][0] |= {"sha256": sha256_of(file), "bytes": file.stat().st_size}
    index.write_text(json.dumps(part))


def put(key: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], object]:
    return lambda tensors: tensors.update({key: make(tensors[key])})


CASES: dict[str, Callable[[dict], object]] = {
    "another rank": put("latents", lambda x: x[..., 0]),
    "a row less": put("latents", lambda x: x[:1]),
    "channels": put("latents", lambda x: torch.cat([x, x], dim=1)),
    "half precision": put("latents", lambda x: x.half()),
    "integers": put("latents", lambda x: x.long()),
    "no latents": lambda tensors: tensors.pop("latents"),
    "frames": put("known", lambda x: x[:, :1]),
    "numbers for truth values": put("known", lambda x: x.float()),
    "3x4 poses": put("world_from_cam", lambda x: x[:, :, :3]),
    "a focal length of zero": put("intrinsics", torch.zeros_like),
    "NaN in latents": put("latents", lambda x: x * float("nan")),
    "NaN in poses": put("world_from_cam", lambda x: x * float("inf")),
    "NaN in tokens": put("image_tokens", lambda x: x * float("nan")),
    "token width": put("text_tokens", lambda x: x[..., :7]),
    "tokens of no rank": put("text_tokens", lambda x: x.flatten()[:3]),
    "no tokens": lambda tensors: tensors.pop("text_tokens"),
    "flat points": put("cloud_points", lambda x: x[..., :2]),
    "colours as numbers": put("cloud_colors", lambda x: x.float()),
}


@pytest.fixture
def folder(shards, tmp_path) -> Path:
    shutil.copytree(shards, tmp_path / "shards")
    return tmp_path / "shards"


@pytest.mark.parametrize("case", CASES)
def test_content_that_is_not_what_the_index_says(folder, stage, case):
    rewritten(folder, CASES[case])
    said = refusal(lambda: distill(stage(data=str(folder))))
    assert str(folder) in said and len(said) < 500, said
    if case not in ("channels", "token width", "no tokens"):  # which only a teacher can know: all shards may have them
        read = refusal(lambda: [ShardSet(folder)[index] for index in range(6)])
        assert "shard-1-of-1-00000.safetensors" in read


def index_with(folder: Path, change: Callable[[dict], object]) -> str:
    index = folder / "part-1-of-1.json"
    part = json.loads(index.read_text())
    change(part)
    index.write_text(json.dumps(part))
    return refusal(lambda: ShardSet(folder).verify())


def test_indices_that_lie(folder, shards):
    assert "twice" in index_with(folder, lambda part: part["shards"].append(part["shards"][0]))
    for word in ("../" * 20 + "etc/passwd", "A" * 64, "0" * 63, ""):
        shutil.copy(shards / "part-1-of-1.json", folder)
        assert "sha256" in index_with(folder, lambda part, word=word: part["shards"][0].update(sha256=word))
    shutil.copy(shards / "part-1-of-1.json", folder)
    assert "parts" in index_with(folder, lambda part: part.update(parts=10**12))
    shutil.copy(shards / "part-1-of-1.json", folder)
    long = "scene-" + "9" * 5000
    assert "number" in index_with(folder, lambda part: part["shards"][0]["clips"][0].update(name=long))


def test_a_name_with_a_trillion_parts_is_told_at_once(folder, shards):
    (folder / "part-1-of-1.json").rename(folder / "part-1-of-1000000000000.json")
    change = {"parts": 10**12}
    file = folder / "part-1-of-1000000000000.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert "no index of shards" in refusal(lambda: ShardSet(folder))
