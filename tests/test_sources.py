"""Where scenes are taken from: what counts as one, and photographs and videos that are posed on the way."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from checks import hashes, refusal
from PIL import Image
from scene_files import document, save_turned, write_colmap, write_depth, write_images, write_nerfstudio

from fvgen.errors import CannotWrite
from fvgen.posing import sources
from fvgen.posing.sources import find_sources, open_source
from fvgen.reports.contact_sheet import inspect
from fvgen.scenes.formats import load_image, read_scene
from fvgen.scenes.readers.photographs import copy_photograph, read_photographs
from fvgen.shards.prepare import prepare
from fvgen.shards.reader import ShardSet
from fvgen.system.places import sha256_of

KEEP_ALL = {"points": 0.0, "overlap": 0.0, "sharpness": 0.0, "motion": 0.0}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache of its own; what one test was refused the next one asks again."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FVGEN_CACHE", str(folder))
    sources._posed.cache_clear()
    return folder


def plain(folder: Path, count: int = 4, seed: int = 0) -> Path:
    """Photographs right in a folder; they share nothing."""
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(seed + i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def names(*paths: Path) -> list[str]:
    return [source.name for source in find_sources(paths)]


# --- Finding ---


def test_what_counts_as_a_scene(tmp_path):
    write_nerfstudio(tmp_path / "b")
    write_colmap(tmp_path / "a")
    write_images(tmp_path / "c")  # photographs in images/, no poses
    plain(tmp_path / "d e")
    (tmp_path / "f.MP4").write_bytes(b"x")
    (tmp_path / "notes").mkdir()
    (tmp_path / "preview.png").write_bytes(b"x")
    (tmp_path / "list.txt").write_text("x")
    plain(tmp_path / ".thumbnails")
    (tmp_path / "d e" / "._0.png").write_bytes(b"x")  # what some systems leave beside each file
    assert names(tmp_path) == ["a", "b", "c", "d e", "f.MP4"]
    assert len(read_photographs(tmp_path / "d e")) == 4
    for name in ("a", "b", "c", "d e", "f.MP4"):
        assert names(tmp_path / name) == [name]


def test_photographs_beside_other_folders_are_one_scene(tmp_path):
    plain(tmp_path / "house")
    plain(tmp_path / "house" / "masks")
    (tmp_path / "house" / "walk.mp4").write_bytes(b"x")
    assert names(tmp_path / "house") == ["house"] and names(tmp_path) == ["house"]


def test_names_differ(tmp_path):
    for parent in ("x", "y"):
        plain(tmp_path / parent / "scene")
    assert names(tmp_path / "x", tmp_path / "y", tmp_path / "x") == ["scene", "y/scene", "x/scene"]
    assert names(tmp_path / "x", tmp_path / "x", tmp_path / "x") == ["scene", "x/scene", "x/scene(2)"]


def test_what_is_none(tmp_path):
    assert "does not exist" in refusal(lambda: find_sources([tmp_path / "none"]))
    (tmp_path / "empty").mkdir()
    assert "is empty" in refusal(lambda: find_sources([tmp_path / "empty"]))
    (tmp_path / "a.txt").touch()
    assert "holds no scene" in refusal(lambda: find_sources([tmp_path]))
    assert "no video" in refusal(lambda: find_sources([tmp_path / "a.txt"]))


# --- Opening ---


def test_a_posed_scene_is_read_as_it_is(tmp_path, cache):
    opened = open_source(write_colmap(tmp_path / "a"))
    assert opened.format == "colmap" and opened.scene.name == "a" and not list(cache.iterdir())


def test_a_refusal_comes_once_and_leaves_the_photographs_alone(tmp_path, cache, capfd):
    pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    folder = plain(tmp_path / "rauschen")
    before = {path.name: sha256_of(path) for path in folder.iterdir()}
    said = refusal(lambda: open_source(folder))
    assert "only 0 of the 4 photographs of rauschen could be posed" in said
    printed = capfd.readouterr().err
    assert printed.count("\n") == 1 and "posing 4 photographs" in printed  # COLMAP itself keeps quiet
    assert refusal(lambda: open_source(folder)) == said and not capfd.readouterr().err
    assert before == {path.name: sha256_of(path) for path in folder.iterdir()}
    assert [path.name for path in cache.rglob("*") if path.is_file()] in ([], ["lock"])
    assert "DUSt3R cannot run" in refusal(lambda: open_source(folder, "dust3r"))


def test_damaged_photographs_and_videos(tmp_path):
    folder = plain(tmp_path / "photos")
    (folder / "3.png").write_bytes(b"")
    assert "3.png is empty" in refusal(lambda: open_source(folder))
    (tmp_path / "walk.mp4").write_bytes(b"no video")
    pytest.importorskip("av", reason="PyAV is not installed")
    assert "walk.mp4 cannot be decoded" in refusal(lambda: open_source(tmp_path / "walk.mp4"))


def test_what_cannot_be_posed_is_skipped_and_listed(tmp_path, teacher_folder):
    pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    good = tmp_path / "data" / "good"
    good.mkdir(parents=True)
    write_depth(good)
    write_nerfstudio(good, document(depth=True))
    plain(tmp_path / "data" / "noise")
    (tmp_path / "data" / "walk.mp4").write_bytes(b"no video")
    options = {"clips_per_scene": 2, "clips_per_shard": 2, "workers": 1, "limits": KEEP_ALL}
    tally = prepare([tmp_path / "data"], tmp_path / "out", 3, (16, 24), teacher=str(teacher_folder), **options)
    assert tally.clips == 2 and [entry.name for entry in tally.skipped] == ["noise", "walk.mp4"]
    assert "could be posed" in tally.skipped[0].reason and "walk.mp4" in tally.skipped[1].reason
    assert ShardSet(tmp_path / "out").skipped() == tally.skipped


def test_a_cache_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch, teacher_folder):
    plain(tmp_path / "noise")
    (tmp_path / "file").touch()
    monkeypatch.setenv("FVGEN_CACHE", str(tmp_path / "file"))
    with pytest.raises(CannotWrite, match="cannot be written"):
        prepare([tmp_path / "noise"], tmp_path / "out", 3, (16, 24), teacher=str(teacher_folder), workers=1)


def test_photographs_are_copied_as_everyone_sees_them(tmp_path):
    """Turned by EXIF, 16-bit, CMYK: other programs get the pixels that we read."""
    (tmp_path / "copies").mkdir()
    (tmp_path / "photos").mkdir()
    save_turned(tmp_path / "photos" / "turned.jpg", 6)
    Image.fromarray(np.arange(432, dtype=np.uint16).reshape(18, 24) * 150).save(tmp_path / "photos" / "deep.png")
    Image.new("CMYK", (24, 18), (10, 200, 30, 40)).save(tmp_path / "photos" / "print.jpg")
    Image.new("RGB", (24, 18), (10, 200, 30)).save(tmp_path / "photos" / "plain.jpg")
    for path in sorted((tmp_path / "photos").iterdir()):
        copy = copy_photograph(path, tmp_path / "copies")
        assert np.array_equal(np.asarray(Image.open(copy).convert("RGB")), load_image(path))
        assert (copy.name == path.name) == (path.name == "plain.jpg")
    (tmp_path / "upside").mkdir()
    save_turned(tmp_path / "upside" / "a.jpg", 3)  # refused beside poses, which may or may not allow for it
    assert len(read_photographs(tmp_path / "upside")) == 1


# --- Real photographs ---


@pytest.fixture
def door(shared, tmp_path) -> Path:
    """Five photographs without their poses, at half their size, in a folder with a space."""
    pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    photographs = sorted((shared / "data" / "scenes" / "lund_door" / "images").iterdir())
    folder = tmp_path / "the door"
    folder.mkdir()
    for path in photographs[:5]:
        Image.open(path).reduce(2).save(folder / path.name, quality=95)
    return folder


@pytest.mark.slow
def test_photographs_are_posed_and_prepared(door, teacher_folder, tmp_path, cache, capfd):
    """By one process, by two with a cache of their own, and from the first one's cache: the same shards."""

    def make(out: str, workers: int = 1) -> Path:
        options = {"clips_per_scene": 2, "clips_per_shard": 1, "limits": KEEP_ALL, "points": "colmap"}
        assert prepare([door], tmp_path / out, 3, (32, 48), teacher=str(teacher_folder), workers=workers, **options)
        return tmp_path / out

    first = make("first")
    clips = ShardSet(first)
    assert {record.format for record in clips.records} == {"photographs/colmap"}
    assert clips.names == ["the door-00", "the door-01"]
    assert sorted(path.name for path in door.iterdir()) == sorted(path.name for path in door.glob("*.jpg"))
    posed = hashes(cache)
    capfd.readouterr()
    assert hashes(make("again")) == hashes(first) and "posing" not in capfd.readouterr().err
    shutil.rmtree(cache / "posed")
    assert hashes(make("two", workers=2)) == hashes(first) and hashes(cache) == posed
    inspect(door, tmp_path / "page.html", clips=1)
    page = (tmp_path / "page.html").read_text()
    assert "photographs/colmap" in page and "the door-00" in page


@pytest.mark.slow
def test_a_video_is_posed(shared, tmp_path):
    """Nine photographs as a film: the poses are those of the photographs, up to a similarity."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    published = read_scene(shared / "data" / "scenes" / "lund_door")
    with av.open(str(tmp_path / "walk.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5, options={"qscale": "2"})
        stream.width, stream.height, stream.pix_fmt = 512, 768, "yuv420p"
        for view in range(9):
            pixels = np.ascontiguousarray(published.image(view)[:, :512])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    opened = open_source(tmp_path / "walk.mp4")
    assert opened.format == "video/colmap" and opened.scene.name == "walk.mp4" and len(opened.scene) == 9
    ours, theirs = (cameras.world_from_cam[:9] for cameras in (opened.scene.cameras, published.cameras))
    steps = [(poses[1:, :3, 3] - poses[:-1, :3, 3]).norm(dim=-1) for poses in (ours, theirs)]
    ratio = steps[0] / steps[1]
    assert (ratio / ratio.median() - 1).abs().max() < 0.05
