"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Before anything imports torch: on tensors this small a second thread only waits for the first, and long where the
# machine is busy. Subprocesses inherit it, so that their numbers are the same bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nobody is at a terminal here, so that a stage would tell on stderr how far it is, where tests, those of subprocesses
# too, look for what went wrong and expect nothing else. test_progress.py asks for these lines.
os.environ["FVGEN_PROGRESS"] = "0"

if TYPE_CHECKING:  # importing diffusers takes seconds, and most test files need none of it
    from fvgen.distill import StageConfig
    from fvgen.models.viewcrafter.pipelines import ViewCrafterPipeline
    from fvgen.shards.one_shard import Tally

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recordings and real scenes beside the repository; a stranger's clone has none."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared (recordings, real scenes) is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def recorded() -> Path:
    """Small recordings that ship with the tests."""
    return Path(__file__).parent / "recorded"


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The tiny teacher that ships with the package."""
    from fvgen.pipelines.presets import SHIPPED

    folder = SHIPPED / "tiny"
    if not (folder / "model_index.json").is_file():
        pytest.skip("the tiny teacher is not in src/fvgen/weights yet")
    return folder


@pytest.fixture(scope="session")
def teacher() -> ViewCrafterPipeline:
    """A small teacher of random weights. Shared: never change it."""
    from small_models import small_teacher

    return small_teacher()


@pytest.fixture(scope="session")
def teacher_folder(teacher: ViewCrafterPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on disk."""
    from fvgen.pipelines.folders import save_model

    folder = tmp_path_factory.mktemp("models") / "teacher"
    save_model(teacher, folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prepared clips of the small teacher's size."""
    from small_models import small_clips

    from fvgen.clips.folder import save_clips

    folder = tmp_path_factory.mktemp("data") / "clips"
    save_clips(folder, small_clips(5), {"kind": "test"})
    return folder


@pytest.fixture
def stage(teacher_folder: Path, clip_folder: Path, tmp_path: Path) -> Callable[..., StageConfig]:
    """Settings of a stage of a few small iterations, written below the test's own folder."""
    from fvgen.distill import changed, stage_config

    def make(name: str = "gan", **changes: Any) -> StageConfig:
        settings = {
            "out": str(tmp_path / name),
            "teacher": str(teacher_folder),
            "data": str(clip_folder),
            "iterations": 3,
            "batch_size": 2,
            "critic_updates": 1,
            "head_channels": 8,
            "student_lr": 1e-3,
            "head_lr": 1e-3,
        } | ({"fake_score_lr": 1e-3} if name == "dmd" else {})
        return changed(stage_config(name, settings), **changes)

    return make


# --- Shards ---


@pytest.fixture(scope="session")
def shard_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small scenes with depth maps, below a space and an umlaut. Shared: never change them."""
    from scene_files import document, write_depth, write_nerfstudio

    folder = tmp_path_factory.mktemp("räume hier")
    for index in range(3):
        scene = folder / f"scene{index}"
        scene.mkdir()
        write_depth(scene)
        write_nerfstudio(scene, document(depth=True))
    return folder


@pytest.fixture(scope="session")
def make_shards(shard_scenes: Path, teacher_folder: Path) -> Callable[..., Tally]:
    """`prepare` on these scenes: two clips of each, three frames of 16x24, two clips a shard, nothing filtered."""
    from fvgen.clips.filters import LIMITS
    from fvgen.shards.prepare import prepare

    def call(out: Path, source: Path | None = None, **changes: Any) -> Tally:
        options = {"clips_per_scene": 2, "clips_per_shard": 2, "workers": 1, "limits": dict.fromkeys(LIMITS, 0.0)}
        options |= {"teacher": str(teacher_folder), **changes}
        return prepare([source or shard_scenes], out, 3, (16, 24), **options)

    return call


@pytest.fixture(scope="session")
def shards(make_shards: Callable[..., Tally], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of all of them. Shared: never change them."""
    out = tmp_path_factory.mktemp("shards") / "all"
    assert make_shards(out).clips == 6
    return out
