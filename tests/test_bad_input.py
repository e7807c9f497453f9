"""Wrong input on the command line: one sentence, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import Outcome, run
from scene_files import VIEWS, document, world, write_nerfstudio
from small_models import small_clips

from fvgen.clips.folder import save_clips
from fvgen.distill import StageConfig
from fvgen.distill import run as distill
from fvgen.geometry.cameras import look_at
from fvgen.geometry.conventions import from_opengl

pytestmark = pytest.mark.slow  # each test starts Python several times, and torch with it
GAN, DMD = "recipes/stage1_gan.py", "recipes/stage2_dmd.py"


def expect(outcome: Outcome, *words: str) -> None:
    """One sentence that holds ``words``; whatever else was printed is no traceback."""
    assert outcome.code == 2, outcome
    lines = outcome.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fvgen: ") and len(lines[0]) < 700, outcome.err
    assert "Traceback" not in outcome.out
    for word in words:
        assert word in lines[0], (word, lines[0])


def listing(folder: Path) -> dict[str, int]:
    """Every file and folder below, with its size."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.exists()}


@pytest.fixture
def settings(teacher_folder, clip_folder, tmp_path) -> Path:
    """A configuration file of a short stage."""
    file = tmp_path / "settings.yaml"
    names = f"teacher: {teacher_folder}\ndata: {clip_folder}\n"
    file.write_text(names + "iterations: 2\nbatch_size: 2\nhead_channels: 8\ncritic_updates: 1\n")
    return file


@pytest.fixture
def stage1(settings, tmp_path) -> Callable[..., Outcome]:
    """The first recipe with further words; it must not leave anything new."""

    def call(*words: object) -> Outcome:
        before = listing(tmp_path)
        outcome = run([GAN, "--config", settings, "out=out", *words], tmp_path)
        assert listing(tmp_path) == before
        return outcome

    return call


# --- Settings ---

WORDS = {
    "iteratoins=3": ("command line: unknown setting 'iteratoins'; did you mean 'iterations'?",),
    "iterations=three": ("iterations='three': input should be a valid integer",),
    "iterations=0": ("iterations=0: input should be greater than or equal to 1",),
    "student_lr=-1e-4": ("student_lr=-0.0001: input should be greater than 0",),
    "divergence=kl": ("divergence='kl' is unknown",),
    "device=cuda:99": ("device 'cuda:99' cannot be used here",),
    "iterations": ("'iterations' is no setting; write key=value",),
    "--iterations=3": ("unrecognized arguments: --iterations=3; see --help",),
}


@pytest.mark.parametrize("word", WORDS)
def test_wrong_settings(stage1, word):
    expect(stage1(word), *WORDS[word])


def test_wrong_configuration_files(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("batch_sise: 4\nout: out\n")
    expect(run([GAN, "--config", bad], tmp_path), "bad.yaml: unknown setting 'batch_sise'; did you mean 'batch_size'?")
    bad.write_text("batch_size: [4\n")
    expect(run([GAN, "--config", bad, "out=out"], tmp_path), "config file", "bad.yaml cannot be read")
    expect(run([GAN, "--config", "none.yaml", "out=out"], tmp_path), "none.yaml cannot be read")
    expect(run([GAN, "out=out"], tmp_path), "--config; see --help")
    assert listing(tmp_path).keys() == {"bad.yaml"}


DEMO_WORDS = {
    "Missing option '--out'": (),
    "Invalid value for '--seed'": ("--out", "out", "--seed", "many"),
    "Invalid value for '--seed': ": ("--out", "out", "--seed", "-1"),  # how it goes on depends on typer's version
    "No such option": ("--out", "out", "--sede", "1"),
    "device 'gpu' cannot be used here": ("--out", "out", "--device", "gpu"),
    "huge is no model folder": ("--out", "out", "--teacher", "huge"),
}


@pytest.mark.parametrize("sentence", DEMO_WORDS)
def test_wrong_words_for_the_demo(tmp_path, sentence):
    expect(run(["fvgen.cli", "demo", *DEMO_WORDS[sentence]], tmp_path), sentence)
    assert not listing(tmp_path)


def test_the_demo_gives_no_advice_about_settings_that_it_has_not(with_tiny):
    """Its stages are told by ``out=DIR`` where to write; it has ``--out``."""
    (with_tiny / "out" / "stage1_gan" / "student").mkdir(parents=True)
    outcome = run(["fvgen.cli", "demo", "--out", "out"], with_tiny)
    expect(outcome, "output folder out/stage1_gan is not empty and holds no run; choose another output folder")
    assert "out=" not in outcome.err


def test_no_such_command(tmp_path):
    expect(run(["fvgen.cli", "dmeo"], tmp_path), "No such command 'dmeo'")


# --- Prepared clips ---


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_clips_that_are_missing_or_empty(stage1, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    expect(stage1("data=none"), "data folder none does not exist")
    expect(stage1("data=empty"), "empty/index.json is no index of prepared clips")
    expect(stage1("data=file"), "file")


def test_clips_that_are_damaged(stage1, clip_folder, tmp_path):
    for name, words in (
        ("clips.safetensors", "is damaged or missing"),
        ("index.json", "is no index of prepared clips"),
    ):
        folder = tmp_path / name.split(".")[0]
        shutil.copytree(clip_folder, folder)
        cut(folder / name)
        expect(stage1(f"data={folder}"), name, words)


def test_clips_of_a_size_that_the_teacher_cannot_take(stage1, tmp_path):
    save_clips(tmp_path / "odd", small_clips(1, width=20), {})
    expect(stage1("data=odd"), "frames of 16x20 do not fit this model; use multiples of 8")


def test_a_damaged_cache_of_latents(stage, stage1, clip_folder, tmp_path):
    distill(stage(iterations=1))
    folder = tmp_path / "clips"
    shutil.copytree(clip_folder, folder)
    cut(next(folder.glob("encoded-*")))
    expect(stage1(f"data={folder}"), "the latent cache", "delete it and run again")


# --- Models ---


def test_teachers_that_are_missing_or_damaged(stage1, teacher_folder, tmp_path):
    expect(stage1("teacher=none"), "none is no model folder")
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_folder, folder)
    cut(folder / "unet" / "diffusion_pytorch_model.safetensors")
    expect(stage1("teacher=teacher"), "model folder teacher is damaged or incomplete")


def test_a_first_stage_that_is_missing_or_not_finished(settings, tmp_path):
    before = listing(tmp_path)
    words = [DMD, "--config", settings, "out=out"]
    expect(run([*words, "init=none"], tmp_path), "init=none does not exist")
    (tmp_path / "started").mkdir()
    expect(run([*words, "init=started"], tmp_path), "init=started is not finished; run it again first")
    assert listing(tmp_path) == before | {"started": listing(tmp_path)["started"]}


# --- Output folders ---


def test_output_folders_that_are_not_ours(stage1, tmp_path):
    (tmp_path / "file").touch()
    expect(stage1("out=file"), "output folder file cannot be written")
    expect(stage1("out=file/below"), "output folder file/below cannot be written")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    expect(stage1("out=full"), "output folder full is not empty and holds no run; choose another output folder")


def test_output_folders_that_are_not_the_demos(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "tiny").mkdir()
    before = listing(tmp_path)
    expect(run(["fvgen.cli", "demo", "--out", "out", "--data", "none"], tmp_path), "data folder none does not exist")
    (tmp_path / "tiny").rmdir()
    assert listing(tmp_path) == {name: size for name, size in before.items() if name != "tiny"}


def finished(stage: Callable[..., StageConfig], out: Path, **changes) -> StageConfig:
    config = stage(out=str(out), iterations=2, checkpoint_every=1, **changes)
    distill(config)
    return config


def words_of(config: StageConfig) -> list[str]:
    values = config.words()
    return [f"{key}={'null' if value is None else value}" for key, value in values.items() if key != "init" or value]


def test_another_run_and_a_cut_checkpoint(stage, settings, tmp_path):
    config = finished(stage, tmp_path / "run")
    before = listing(tmp_path)
    words = [GAN, "--config", settings, *words_of(config)]
    expect(run([*words, "seed=5"], tmp_path), "holds another run (seed is 0 there and 5 here)")
    assert listing(tmp_path) == before
    cut(tmp_path / "run" / "checkpoints" / "00000002" / "student.pt")
    before = listing(tmp_path)
    expect(run([*words, "iterations=3"], tmp_path), "00000002 is damaged or cut short")
    assert listing(tmp_path) == before


# --- A full disk: no file may grow beyond a limit, which is a real error of the system ---

PHASES = {"config.yaml": 700, "latents": 20_000, "metrics.jsonl": 3_000, "checkpoints": 1_000_000, "student": 500_000}


@pytest.mark.parametrize("name", PHASES)
def test_a_full_disk(stage, settings, tmp_path, clip_folder, name):
    data = tmp_path / "clips"
    shutil.copytree(clip_folder, data, ignore=shutil.ignore_patterns("encoded-*"))
    changes = {"data": str(data), "iterations": 12 if name == "metrics.jsonl" else 2}
    out = tmp_path / "run"
    words = [GAN, "--config", settings, *words_of(stage(out=str(out), **changes))]
    if name not in ("config.yaml", "latents"):
        assert run([*words, f"out={tmp_path / 'whole'}"], tmp_path).code == 0  # ... which also fills the cache
    if name == "student":  # all but the export is done
        shutil.copytree(
            tmp_path / "whole", out, ignore=shutil.ignore_patterns("student", "summary.json", "config.yaml")
        )
        (out / "config.yaml").write_text((tmp_path / "whole" / "config.yaml").read_text())
    before = listing(tmp_path)

    outcome = run(words, tmp_path, file_limit=PHASES[name])
    expect(outcome, "cannot write", name, "the disk is full; free some space and run the same command again")
    new = listing(tmp_path).keys() - before.keys()
    assert not any("partial" in path for path in new)
    if name in ("config.yaml", "latents"):
        assert not new
    elif name == "metrics.jsonl":
        curves = {path for path in new if path.startswith("run/tensorboard")}  # where it is installed
        names = (".lock", "config.yaml", "log.txt", "metrics.jsonl", "monitor.jsonl")
        assert new - curves == {"run", *(f"run/{file}" for file in names)}
    if name in ("metrics.jsonl", "checkpoints"):
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert 0 < len(rows) < 12

    assert run(words, tmp_path).code == 0  # space was freed: the same command finishes
    if name not in ("config.yaml", "latents"):
        for file in ("metrics.jsonl", "student/unet/diffusion_pytorch_model.safetensors"):
            assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


# --- Scenes ---


def many_views(count: int = 9) -> dict:
    """transforms.json of ``count`` cameras on an arc, with the photographs that `write_views` writes."""
    angle = torch.linspace(-0.3, 0.3, count, dtype=torch.float64)
    position = torch.stack([4 * angle.sin(), 0.3 * angle, -4 * angle.cos()], dim=-1)
    poses = from_opengl(look_at(position, torch.zeros_like(position), position.new_tensor([0.0, -1.0, 0.0])))
    frames = [{"file_path": f"images/{i:02d}.png", "transform_matrix": pose} for i, pose in enumerate(poses.tolist())]
    return document() | {"frames": frames}


def write_views(folder: Path, contents: dict) -> Path:
    """A scene with depth maps, so that clips can be rendered from it."""
    width, height = contents["w"], contents["h"]
    (folder / "images").mkdir(parents=True)
    for index, frame in enumerate(contents["frames"]):
        pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.byte().numpy()).save(folder / frame["file_path"])
        frame["depth_file_path"] = f"depth-{index:02d}.png"
        Image.fromarray(torch.full((height, width), 4000, dtype=torch.uint16).numpy()).save(
            folder / frame["depth_file_path"]
        )
    (folder / "transforms.json").write_text(json.dumps(contents))
    return folder


def unreadable_image(scene: Path) -> None:
    (scene / "images" / "02.png").write_bytes(b"no image")


def another_size(scene: Path) -> None:
    Image.new("RGB", (40, 30)).save(scene / "images" / "02.png")


def change_pose(value: float) -> Callable[[Path], None]:
    def change(scene: Path) -> None:
        contents = json.loads((scene / "transforms.json").read_text())
        contents["frames"][2]["transform_matrix"][0][0] = value
        (scene / "transforms.json").write_text(json.dumps(contents))

    return change


SCENES = {
    "unreadable image": (unreadable_image, "02.png cannot be read"),
    "another size": (another_size, "is 40x30 but its camera says 24x18"),
    "no rotation": (change_pose(1.5), "frame 2 ('images/02.png'): the pose is no rotation"),
    "NaN in a pose": (change_pose(float("nan")), "frame 2 ('images/02.png'): transform_matrix holds nan"),
}


@pytest.mark.parametrize("case", SCENES)
def test_scenes_that_cannot_be_read(tmp_path, case):
    assert len(world()[0]) == VIEWS
    for name in ("desk", "door"):
        write_nerfstudio(tmp_path / "data" / name)
    damage, words = SCENES[case]
    damage(tmp_path / "data" / "door")
    before = listing(tmp_path)
    expect(run(["fvgen.cli", "demo", "--data", "data", "--out", "out"], tmp_path), "door", words)
    assert listing(tmp_path) == before


def test_folders_without_scenes(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "file").touch()
    words = ["fvgen.cli", "demo", "--out", "out", "--data"]
    expect(run([*words, "none"], tmp_path), "data folder none does not exist; check the path")
    expect(run([*words, "file"], tmp_path), "file is a file but no video")
    expect(run([*words, "data"], tmp_path), "data folder data is empty")
    write_nerfstudio(tmp_path / "data" / "desk")
    expect(run([*words, "data"], tmp_path), "the one scene desk has 4 photographs with poses")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def with_tiny(tmp_path, teacher_folder) -> Path:
    """A folder in which the preset's name leads to the small teacher: folders go before presets."""
    (tmp_path / "tiny").symlink_to(teacher_folder)
    return tmp_path


def test_what_only_the_preparation_finds(with_tiny):
    """Too few views, and pixels that end early, in the scene that is prepared last."""
    words = ["fvgen.cli", "demo", "--data", "data", "--out", "runs/out", "--frames", "8", "--size", "16x24"]
    write_views(with_tiny / "data" / "a", many_views())
    write_views(with_tiny / "data" / "b", many_views(4))
    before = listing(with_tiny)
    expect(run(words, with_tiny), "scene b has 4 views but a clip needs 8 frames")
    assert not (with_tiny / "runs" / "out").exists()

    shutil.rmtree(with_tiny / "data" / "b")
    cut(write_views(with_tiny / "data" / "b", many_views()) / "images" / "04.png")
    expect(run(words, with_tiny), "04.png cannot be read")
    assert not (with_tiny / "runs" / "out").exists()
    assert listing(with_tiny / "tiny") and before


def test_output_folders_of_the_demo(with_tiny):
    for name in ("a", "b"):
        write_views(with_tiny / "data" / name, many_views())
    (with_tiny / "file").touch()
    (with_tiny / "full").mkdir()
    (with_tiny / "full" / "thesis.tex").touch()
    before = listing(with_tiny)
    words = ["fvgen.cli", "demo", "--data", "data", "--frames", "8", "--size", "16x24", "--out"]
    expect(run([*words, "file"], with_tiny), "output folder file cannot be written")
    expect(run([*words, "file/below"], with_tiny), "output folder file/below cannot be written")
    expect(
        run([*words, "full"], with_tiny), "output folder full holds something else (thesis.tex); choose another --out"
    )
    assert listing(with_tiny) == before
