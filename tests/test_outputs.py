"""Where a command may write: a new path or what fvgen wrote there, and nothing that is read."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from checks import refusal

from fvgen.convert.command import convert_back
from fvgen.distill import export_checkpoint
from fvgen.distill import run as distill
from fvgen.errors import CannotWrite
from fvgen.reports.contact_sheet import inspect
from fvgen.shards.prepare import prepare
from fvgen.system.files import TEMPORARY, atomic_path, busy, judge_output, recover

COMMANDS = {
    "inspect": lambda scene, teacher, out: inspect(scene, out),
    "prepare": lambda scene, teacher, out: prepare([scene], out, 3, (16, 24), teacher=str(teacher), workers=1),
    "convert back": lambda scene, teacher, out: convert_back(teacher, out),
}


@pytest.fixture
def scene(shard_scenes) -> Path:
    return shard_scenes / "scene0"


@pytest.mark.parametrize("out", ["", " ", ".", "..", "/", "./", "../..", "x\0y"])
@pytest.mark.parametrize("command", ["inspect", "prepare", "convert back"])
def test_no_command_writes_over_the_place_where_one_stands(scene, teacher_folder, tmp_path, monkeypatch, command, out):
    monkeypatch.chdir(tmp_path)
    refusal(lambda: COMMANDS[command](scene, teacher_folder, out))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["inspect", "prepare", "convert back"])
def test_pipes_devices_and_inputs_stay(scene, teacher_folder, tmp_path, command):
    os.mkfifo(tmp_path / "pipe")
    inside = {"convert back": teacher_folder / "unet"}.get(command, scene / "transforms.json")
    before = {path: path.stat().st_mtime_ns for path in [*scene.rglob("*"), *teacher_folder.rglob("*")]}
    for out in (tmp_path / "pipe", Path("/dev/null"), inside, scene / "new", scene):
        if command == "convert back" and out in (scene / "new", scene):
            out = teacher_folder / "new.ckpt"
        refusal(lambda out=out: COMMANDS[command](scene, teacher_folder, out))
    assert before == {path: path.stat().st_mtime_ns for path in [*scene.rglob("*"), *teacher_folder.rglob("*")]}
    assert (tmp_path / "pipe").is_fifo()


def test_a_page_is_replaced_and_nothing_else(scene, tmp_path):
    page = inspect(scene, tmp_path / "page.html")
    assert inspect(scene, page) == page
    for text in ("", "<!doctype html><p>mine", "\0" * 9):
        page.write_text(text)
        assert "fvgen did not write it" in refusal(lambda: inspect(scene, page))
        assert page.read_text() == text


def test_an_export_does_not_go_into_its_run(stage, tmp_path):
    distill(stage(iterations=1))
    run = tmp_path / "gan"
    assert "lie in one another" in refusal(lambda: export_checkpoint(run, run / "student"))
    assert "lie in one another" in refusal(lambda: export_checkpoint(run, run / "checkpoints" / "x"))


def test_links_are_followed_before_they_are_judged(tmp_path):
    (tmp_path / "scene").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "scene")
    assert "lie in one another" in refusal(lambda: judge_output(tmp_path / "link" / "out", inputs=[tmp_path / "scene"]))
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    assert "did not write it" in refusal(lambda: judge_output(tmp_path / "dead", ours=lambda path: False))


def test_two_at_once_have_names_of_their_own(tmp_path):
    """... and what dead processes left goes, what living ones write stays."""
    with atomic_path(tmp_path / "file") as first, atomic_path(tmp_path / "file") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
        recover(tmp_path / "file")
        assert first.exists() and second.exists()
    assert (tmp_path / "file").read_text() == "1"  # of the last one, whole
    dead = tmp_path / f"file{TEMPORARY}-{first.name.split('-')[1]}-{2**22 + 1}-0"
    dead.write_text("half")
    recover(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_second_command_for_one_place_is_told_to_wait(tmp_path):
    said = []
    with busy(tmp_path / "out"):

        def try_it() -> None:
            said.append(refusal(lambda: busy(tmp_path / "out").__enter__()))

        other = threading.Thread(target=try_it)
        other.start()
        other.join()
    assert "another command writes" in said[0]
    with busy(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_long_names(tmp_path):
    """A name of 255 bytes has no room for a suffix, and needs none of its own."""
    for name in ("x" * 255, "ä" * 127):
        with atomic_path(tmp_path / name) as temporary:
            temporary.write_text("1")
        assert (tmp_path / name).read_text() == "1"
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(CannotWrite, match="too long"), atomic_path(tmp_path / ("x" * 256)) as temporary:
        temporary.write_text("1")


def test_what_cannot_be_had_is_told_before_anything_is_made(scene, teacher_folder, tmp_path, monkeypatch):
    for name in ("FVGEN_DEPTH_PRO", "FVGEN_DOWNLOAD", "FVGEN_DUST3R"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("fvgen.depth.depth_pro.try_to_load_from_cache", lambda *_: None)
    for points in ("depth_pro", "dust3r"):
        options = {"teacher": str(teacher_folder), "points": points, "workers": 1}
        assert points in refusal(lambda options=options: prepare([scene], tmp_path / "out", 3, (16, 24), **options))
    assert not list(tmp_path.iterdir())
