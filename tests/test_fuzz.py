"""Structure-aware damage to every file that fvgen reads, and to command lines: an answer, a sentence, nothing else.

`FUZZ` examples of each kind run in the quick tests, `MANY` in the slow ones. What is not refused must still be finite.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scene_files import document, write_nerfstudio

from fvgen.clips.folder import ClipFolder
from fvgen.clips.latents import load_latents
from fvgen.convert.lvdm_yaml import read_lvdm_config
from fvgen.distill.checkpoint import load_weights, read_index, save_checkpoint
from fvgen.distill.config import parse_overrides, read_stage_config
from fvgen.distill.run_folder import read_metrics, read_run_config, read_summary
from fvgen.errors import LONGEST, UserError
from fvgen.models.viewcrafter.pipelines import ViewCrafterPipeline
from fvgen.pipelines.folders import load_pipeline
from fvgen.scenes.formats import read_scene
from fvgen.shards.reader import ShardSet
from fvgen.system.places import sha256_of

FUZZ, MANY = 300, 5000  # over all targets
STRANGE = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 10**4299, 1e308, -1e-308, math.nan, math.inf, -math.inf, ""),
    *("x", "x" * 5000, "../../etc/passwd", "\u2028", "\0", "1e3", "os.system", [], {}, [[]], [None], {"": {}}),
    *([0] * 400, {"auto_map": {"A": "b.C"}}, ["os", "system"], ["diffusers", "AutoencoderKL"], [None, None]),
)
"""Values in place of others."""


def mutated(value: Any, rng: random.Random) -> Any:
    """JSON with one part changed: another value, a key or entry more, less, twice, or under another name."""
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        keys = part.keys() if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        for key in list(keys):
            places.append((part, key))
            walk(part[key])

    value = json.loads(json.dumps(value))
    walk(value)
    if not places or rng.random() < 0.05:
        return rng.choice(STRANGE)
    part, key = rng.choice(places)
    move = rng.randrange(6)
    if move == 0 and isinstance(part, dict):
        part[rng.choice(["x", "", "_class_name", "auto_map", "format"])] = part.pop(key)
    elif move == 1:
        del part[key]
    elif move == 2 and isinstance(part, list):
        part.append(part[key])
    elif move == 3 and isinstance(part[key], int | float) and not isinstance(part[key], bool):
        part[key] = rng.choice([-part[key], part[key] * 10**9, part[key] + 1, str(part[key]), [part[key]]])
    else:
        part[key] = rng.choice(STRANGE)
    return value


def damage_json(file: Path, rng: random.Random) -> None:
    text = json.dumps(mutated(json.loads(file.read_text()), rng))
    file.write_bytes(damage_bytes(text.encode(), rng) if rng.random() < 0.1 else text.encode())


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    noise = bytes(rng.randrange(256) for _ in range(rng.choice([0, 1, 8])))
    return rng.choice(
        [data[:place], data[:place] + noise + data[place + len(noise) :], data[:place] + noise + data[place:]]
    )


def damage_tensors(file: Path, rng: random.Random) -> None:
    """One tensor less, more, of another type, shape or value; the file is a valid one."""
    tensors = load_file(file)
    key = rng.choice(sorted(tensors))
    tensor = tensors[key]
    moves: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: tensor.flatten(),
        lambda: tensor[None].contiguous(),
        lambda: tensor[:0] if tensor.ndim else tensor[None],
        lambda: torch.cat([tensor, tensor]) if tensor.ndim else tensor[None],
        lambda: tensor.to(rng.choice([torch.int64, torch.bool, torch.float16, torch.float64, torch.uint8])),
        lambda: torch.full_like(tensor, rng.choice([math.nan, math.inf])) if tensor.is_floating_point() else ~tensor,
        lambda: tensor * 0,
    )
    if rng.random() < 0.15:
        del tensors[key]
    else:
        tensors[rng.choice([key, key, key, "another"])] = rng.choice(moves)().clone()
    save_file(tensors, file, metadata={"format": "pt"})


Target = tuple[Callable[[Path, random.Random], None], Callable[[Path], Any]]


@pytest.fixture(scope="module")
def originals(tmp_path_factory, teacher_folder, clip_folder, shards) -> Path:
    """One of every kind of folder."""
    root = tmp_path_factory.mktemp("originals")
    for name, folder in (("model", teacher_folder), ("clips", clip_folder), ("shards", shards)):
        shutil.copytree(folder, root / name, ignore=shutil.ignore_patterns("encoded-*"))
    write_nerfstudio(root / "scene", document())
    run = root / "run"
    run.mkdir()
    rows = [{"iteration": i, "loss_student": 0.5} for i in range(1, 4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "summary.json").write_text(json.dumps({"stage": "gan", "iterations": 3, "seconds": 1.5}))
    words = {"method": "gan", "out": "runs/a", "teacher": "tiny", "data": "builtin", "iterations": 3, "head_lr": 1e-4}
    (run / "config.yaml").write_text(json.dumps({"fvgen": "0.1.0", **words, "contents": {}}))

    class Thing:
        def state_dict(self) -> dict:
            return {"module": {"a": torch.ones(3), "b": torch.zeros(2, 2)}}

    save_checkpoint(run / "00000003", 3, {"ema": Thing()}, {"stage": "gan"})
    return root


def _json_of(*names: str) -> Callable[[Path, random.Random], None]:
    return lambda root, rng: damage_json(root / rng.choice(names), rng)


PARTS = ("unet", "vae", "image_encoder", "image_projector", "prompts")
CONFIGS = tuple(f"model/{part}/config.json" for part in PARTS)


def _weights(root: Path, rng: random.Random) -> None:
    damage_tensors(next((root / "model" / rng.choice(PARTS)).glob("*.safetensors")), rng)


def _shard(root: Path, rng: random.Random) -> None:
    """With the right checksum: only the content lies."""
    from safetensors import safe_open

    file, index = sorted((root / "shards").glob("shard-*"))[0], root / "shards" / "part-1-of-1.json"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    damage_tensors(file, rng)
    save_file(load_file(file), file, metadata)
    part = json.loads(index.read_text())
    part["shards"][0] |= {"sha256": sha256_of(file), "bytes": file.stat().st_size}
    index.write_text(json.dumps(part))


def _state(root: Path, rng: random.Random) -> None:
    file, index = root / "run" / "00000003" / "ema.pt", root / "run" / "00000003" / "checkpoint.json"
    odd = [
        7,
        None,
        [],
        {3: torch.ones(1)},
        {"a": torch.ones(1).long()},
        {"a": torch.ones(2, 2).to_sparse()},
        {"a": [1]},
    ]
    torch.save(rng.choice([{"module": rng.choice(odd)}, rng.choice(odd), {}]), file)
    if rng.random() < 0.3:
        file.write_bytes(damage_bytes(file.read_bytes(), rng))
    found = json.loads(index.read_text())
    index.write_text(json.dumps(found | {"sha256": {"ema.pt": sha256_of(file)}}))


def _text(*names: str) -> Callable[[Path, random.Random], None]:
    def change(root: Path, rng: random.Random) -> None:
        file = root / rng.choice(names)
        file.write_bytes(damage_bytes(file.read_bytes(), rng))

    return change


def read_model(root: Path) -> None:
    model = load_pipeline(root / "model", ViewCrafterPipeline)
    for part in model.components.values():
        if isinstance(part, torch.nn.Module):
            assert all(tensor.isfinite().all() for tensor in part.state_dict().values())


def read_clips(root: Path) -> None:
    clips = ClipFolder(root / "clips")
    assert clips[0].truth.isfinite().all()


def read_shards(root: Path) -> None:
    shards = ShardSet(root / "shards")
    for index in range(len(shards)):
        assert all(tensor.isfinite().all() for tensor in shards[index].tensors().values())


TARGETS: dict[str, Target] = {
    "model_index": (_json_of("model/model_index.json"), read_model),
    "model configs": (_json_of(*CONFIGS), read_model),
    "model weights": (_weights, read_model),
    "shards": (_shard, read_shards),
    "part": (_json_of("shards/part-1-of-1.json"), read_shards),
    "clip index": (_json_of("clips/index.json"), read_clips),
    "clips": (lambda r, rng: damage_tensors(r / "clips" / "clips.safetensors", rng), read_clips),
    "scene": (_json_of("scene/transforms.json"), lambda r: read_scene(r / "scene")),
    "scene bytes": (_text("scene/transforms.json"), lambda r: read_scene(r / "scene")),
    "summary": (_json_of("run/summary.json"), lambda r: read_summary(r / "run")),
    "metrics": (_text("run/metrics.jsonl"), lambda r: read_metrics(r / "run")),
    "run config": (_json_of("run/config.yaml"), lambda r: read_run_config(r / "run")),
    "run config bytes": (_text("run/config.yaml"), lambda r: read_run_config(r / "run")),
    "settings": (_json_of("run/config.yaml"), lambda r: read_stage_config("gan", r / "run" / "config.yaml", [])),
    "yaml of a checkpoint": (_json_of("run/config.yaml"), lambda r: read_lvdm_config(r / "run" / "config.yaml")),
    "checkpoint index": (_json_of("run/00000003/checkpoint.json"), lambda r: read_index(r / "run/00000003", "mend")),
    "state": (_state, lambda r: load_weights(r / "run" / "00000003", "ema")),
}  # fmt: skip


def fuzz(originals: Path, work: Path, name: str, seed: int) -> None:
    """One damaged copy of what a target reads; it answers, or says one sentence."""
    damage, read = TARGETS[name]
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(originals, work)
    damage(work, random.Random(seed))
    try:
        read(work)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) <= LONGEST + 10, str(error)


OPTIONS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=FUZZ // len(TARGETS), derandomize=True, **OPTIONS)
@given(seed=st.integers(0, 2**32))
def test_damaged_files_are_answered(originals, tmp_path_factory, name, seed):
    fuzz(originals, tmp_path_factory.getbasetemp() / "fuzz", name, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=MANY // len(TARGETS), **OPTIONS)
@given(seed=st.integers(0, 2**63))
def test_many_damaged_files_are_answered(originals, tmp_path_factory, name, seed):
    fuzz(originals, tmp_path_factory.getbasetemp() / "fuzz", name, seed)


@settings(max_examples=FUZZ, **OPTIONS)
@given(
    words=st.lists(st.text(min_size=1), max_size=4), keys=st.sampled_from(["iterations", "data", "head_lr", "x", ""])
)
def test_words_of_a_command_line_are_answered(words, keys):
    try:
        parse_overrides([f"{keys}={word}" for word in words])
        parse_overrides(words)
    except UserError as error:
        assert len(str(error)) < 400


def test_a_cache_of_latents_that_lies(clip_folder, teacher, tmp_path):
    """Every tensor of it, damaged in every way."""
    shutil.copytree(clip_folder, tmp_path / "clips")
    clips = ClipFolder(tmp_path / "clips")
    load_latents(clips, teacher)
    file = next((tmp_path / "clips").glob("encoded-*"))
    whole = file.read_bytes()
    for seed in range(20):
        file.write_bytes(whole)
        damage_tensors(file, random.Random(seed))
        try:
            found = load_latents(clips, teacher)
        except UserError as error:
            assert str(file) in str(error)
            continue
        assert all(tensor.isfinite().all() for tensor in found.tensors.values() if tensor.is_floating_point())
