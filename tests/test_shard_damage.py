"""Shards and what may befall them: kills, full disks, flipped bits, indices that lie. Made again or refused by name."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import processes
import pytest
import torch
from checks import flip, hashes, refusal

from fvgen.errors import UserError
from fvgen.shards.reader import ShardSet, holds_shards

FRAMES, CLIPS = 3, 2  # of the fixture `shards`


def same(a, b) -> bool:
    a, b = a.tensors(), b.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def command(shard_scenes: Path, teacher_folder: Path, out: Path, workers: int = 1) -> list[object]:
    """Six clips, a shard each; all pass the filters."""
    words = ["fvgen.cli", "prepare", shard_scenes, "--out", out, "--frames", FRAMES, "--size", "16x24"]
    words += ["--clips-per-scene", CLIPS, "--clips-per-shard", 1, "--teacher", teacher_folder, "--workers", workers]
    return words


def test_lost_and_damaged_shards_are_made_again(make_shards, shards, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(shards, out)
    first, second, third = sorted(out.glob("shard*"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-10])
    flip(third, -5)
    (out / "shard-1-of-1-00000.safetensors.partial").write_bytes(b"half")
    make_shards(out)
    assert hashes(out) == hashes(shards)


def test_killed_again_and_again(shard_scenes, teacher_folder, tmp_path):
    """SIGKILL at ever later moments; then the same command to the end."""
    out, straight = tmp_path / "out", tmp_path / "straight"
    words = command(shard_scenes, teacher_folder, out)
    assert processes.run(command(shard_scenes, teacher_folder, straight), tmp_path).code == 0
    kills = 0
    for files in (1, 2, 4):  # the index of the part, then one shard after the other
        run = processes.Command(words, tmp_path)
        while run.running() and len(list(out.glob("*"))) <= files:
            time.sleep(0.002)
        kills += run.running()
        run.kill()
    assert kills
    last = processes.run(words, tmp_path)
    assert last.code == 0 and hashes(out) == hashes(straight), last.err
    assert f"{len(ShardSet(out))} clips" in last.out


@pytest.mark.slow
def test_two_workers_killed_at_any_moment(shard_scenes, teacher_folder, tmp_path):
    """Their parent gets a SIGKILL and they go with it, wherever they are; the next run finds nothing half-written."""
    out, straight, rng = tmp_path / "out", tmp_path / "straight", random.Random(11)
    assert processes.run(command(shard_scenes, teacher_folder, straight), tmp_path).code == 0
    words, kills = command(shard_scenes, teacher_folder, out, workers=2), 0
    for _ in range(4):
        run, files = processes.Command(words, tmp_path), len(list(out.glob("*")))
        while run.running() and len(list(out.glob("*"))) <= files:  # the workers have begun to write
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        kills += run.running()
        run.kill()
        shutil.copytree(out, tmp_path / "seen", dirs_exist_ok=True)
    assert kills
    last = processes.run(words, tmp_path)
    assert last.code == 0 and hashes(out) == hashes(straight), last.err
    for path in (tmp_path / "seen").glob("*.safetensors"):  # what had its final name was whole
        assert path.read_bytes() == (out / path.name).read_bytes()


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk(shard_scenes, teacher_folder, tmp_path, workers):
    """Indices still fit, shards do not: one sentence, nothing half-written, and the same command goes on afterwards."""
    out, straight = tmp_path / "out", tmp_path / "straight"
    words = command(shard_scenes, teacher_folder, out, workers)
    full = processes.run(words, tmp_path, file_limit=8_000)
    said = full.err.strip().splitlines()[-1]
    assert full.code == 2 and "Traceback" not in full.err and said.startswith("fvgen: cannot write "), full.err
    assert ".safetensors: the disk is full; free some space and run the same command again" in said
    assert [path.name for path in out.iterdir()] == ["part-1-of-1.json"]
    assert "unfinished" in refusal(lambda: ShardSet(out))
    assert processes.run(words, tmp_path).code == 0
    assert processes.run(command(shard_scenes, teacher_folder, straight), tmp_path).code == 0
    assert hashes(out) == hashes(straight)


@pytest.mark.parametrize("place", [0, 9, 300, -1])
def test_a_flipped_bit_is_detected_and_named(shards, tmp_path, place):
    out = tmp_path / "out"
    shutil.copytree(shards, out)
    shard = sorted(out.glob("shard*"))[1]
    flip(shard, place)
    clips = ShardSet(out)
    assert clips[0].latents.isfinite().all()  # another shard is still good
    for read in (lambda: clips[2], clips.verify, lambda: clips.batch([0, 3])):
        assert shard.name in (said := refusal(read)) and "altered" in said


def test_a_truncated_or_missing_shard_is_named(shards, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(shards, out)
    shard = sorted(out.glob("shard*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in (said := refusal(ShardSet(out).verify)) and "bytes instead of" in said
    shard.unlink()
    assert shard.name in (said := refusal(ShardSet(out).verify)) and "is missing" in said


def test_bad_folders_are_refused_in_one_sentence(shards, make_shards, tmp_path):
    assert "does not exist" in refusal(lambda: ShardSet(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "holds no shards" in refusal(lambda: ShardSet(tmp_path / "empty")) and not holds_shards(tmp_path / "empty")
    index = json.loads((shards / "part-1-of-1.json").read_text())

    def altered(name: str = "part-1-of-1.json", **changes) -> str:
        out = tmp_path / "altered"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(shards, out)
        (out / name).write_text(json.dumps(index | changes))
        return refusal(lambda: ShardSet(out))

    assert "unfinished" in altered(complete=False)
    assert "no index" in altered(format=9)
    assert "no index" in altered(shards=[index["shards"][0] | {"file": "../../etc/passwd"}])
    assert "no index" in altered("part-2-of-2.json")
    assert "mixes parts" in altered("part-2-of-2.json", part=2, parts=2)
    assert "shard-1-of-1-00000.safetensors is in no part" in altered(shards=[])
    assert "other settings (seed" in refusal(lambda: make_shards(shards, seed=3))
    assert "parts of 1, not of 2" in refusal(lambda: make_shards(shards, part=(1, 2)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert "thesis.txt" in refusal(lambda: make_shards(tmp_path / "mine"))


# --- Indices that lie ---


def mutated(text: str, rng: random.Random) -> str:
    """A flipped bit, a cut, a lost stretch, or a value of another kind somewhere in the document."""
    data, kind = bytearray(text.encode()), rng.randrange(4)
    place = rng.randrange(len(data))
    if kind == 0:
        data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        del data[place : place + rng.randint(1, 60)]
    else:
        return json.dumps(_changed(json.loads(text), rng))
    return data.decode(errors="surrogateescape")


def _changed(value: object, rng: random.Random) -> object:
    """One leaf or branch is lost, doubled or replaced."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, copy = rng.choice(keys), value.copy()
        if rng.random() < 0.15:
            del copy[key]
        else:
            copy[key] = _changed(value[key], rng)
        return copy
    junk = [None, True, -1, 0, 10**30, 1.5, float("nan"), "", "../x", "ü" * 300, [], {}, [[[]]], {"a": 1}]
    return rng.choice([*junk, [value, value]])


def test_fuzzed_indices(shards, make_shards, tmp_path):
    """Each is refused in one sentence that names the file, or does no harm: the clips are what they were."""
    out, good = tmp_path / "out", ShardSet(shards)
    shutil.copytree(shards, out)
    index, rng = out / "part-1-of-1.json", random.Random(3)
    text, refused = index.read_text(), 0
    for number in range(300):
        index.write_bytes(mutated(text, rng).encode(errors="surrogateescape"))
        try:
            clips = ShardSet(out)
            clips.verify()
            read = [clips[row] for row in range(len(clips))]
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600 and ";" in str(error)
            assert "part-1-of-1.json" in str(error) or "shard-1-of-1-0000" in str(error), error
        else:
            assert clips.names == good.names and clips.records == good.records
            assert all(same(a, good[row]) for row, a in enumerate(read))
        if number % 20 == 0:  # and `prepare` goes on from it, or says why it does not
            try:
                make_shards(out)
            except UserError as error:
                assert "\n" not in str(error) and str(out) in str(error)
            else:
                assert hashes(out) == hashes(shards)
    assert 150 < refused < 300
