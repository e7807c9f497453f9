"""The settings that ship: accepted by both stages, explained key by key, and what `fvgen plan` says fits."""

from __future__ import annotations

import re
import shlex

import pytest
from conftest import REPOSITORY
from typer.testing import CliRunner

from fvgen.cli import app
from fvgen.distill import StageConfig, read_stage_config

CONFIGS = REPOSITORY / "recipes" / "configs"
FULL_SIZE = ("viewcrafter_8x80gb", "viewcrafter_24gb_lora", "viewcrafter_576x1024")


def both_stages(name: str) -> list[StageConfig]:
    return [read_stage_config(stage, CONFIGS / f"{name}.yaml", ["out=unused"]) for stage in ("gan", "dmd")]


def commands(name: str) -> list[list[str]]:
    """Those that the file's first lines tell, by word."""
    header = (CONFIGS / f"{name}.yaml").read_text().split("\n\n")[0]
    told = re.findall(r"^#   (\w.*(?:\n#       .*)*)", header, re.MULTILINE)
    return [shlex.split(line.replace("\n#", "").replace("\\", "")) for line in told]


@pytest.mark.parametrize("name", sorted(file.stem for file in CONFIGS.glob("*.yaml")))
def test_both_stages_take_every_file(name):
    gan, dmd = both_stages(name)
    assert gan.method.dmd_weight == 0 and dmd.method.matching
    assert gan.method.student_steps == dmd.method.student_steps and gan.memory == dmd.memory


@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_key_is_explained_and_every_file_is_there(name):
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r"\s*\w+: \S", line)]
    assert len(keys) > 20 and all(lines[number - 1].strip().startswith("# ") for number in keys)
    assert [words[:2] for words in commands(name)][-3:-2] == [["fvgen", "plan"]]
    for words in commands(name)[-3:]:
        files = [word for word in words if word.endswith((".py", ".yaml", ".json"))]
        assert files and all((REPOSITORY / file).is_file() for file in files)


def test_the_papers_run_has_what_the_paper_states():
    gan, dmd = both_stages("viewcrafter_8x80gb")
    assert (gan.run.iterations, dmd.run.iterations, dmd.data.batch_size) == (4000, 5000, 8 * 4)
    assert {optimizer.lr for stage in (gan, dmd) for optimizer in stage.optim.values()} == {5e-5}
    assert dmd.method.divergence == "softened_reverse_kl" and dmd.method.student_steps == 4


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["gan", "dmd"])
@pytest.mark.parametrize("name", FULL_SIZE)
def test_it_fits_and_trains_by_the_command_that_it_tells(name, stage, monkeypatch):
    """Minutes for each of them, once: profiles are kept."""
    monkeypatch.chdir(REPOSITORY)
    _, *words = next(words for words in commands(name) if words[1] == "plan")
    outcome = CliRunner().invoke(app, [*words, "--stage", stage], env={"COLUMNS": "80"})
    assert outcome.exit_code == 0, outcome.output
    printed = shlex.split(outcome.output.partition("Recommended")[2].splitlines()[1])
    told = next(words for words in commands(name) if f"recipes/stage{1 if stage == 'gan' else 2}_{stage}.py" in words)
    known = lambda words: {word for word in words if not word.startswith(("teacher=", "init=", "out="))}  # noqa: E731
    assert known(printed) == known(told)


VIDEOSCENE = sorted((CONFIGS / "videoscene").glob("*.yaml"))


@pytest.mark.parametrize("name", ["tiny", "8x80gb"])
def test_lalrms_files_are_whole(name):
    file = CONFIGS / "wonderland" / f"lalrm-{name}.yaml"
    config = read_stage_config("lalrm", file, ["out=unused"])
    header = file.read_text().split("\n\n")[0]
    files = re.findall(r"recipes/[\w/-]+\.(?:py|yaml|json)", header)
    assert len(files) >= 3 and all((REPOSITORY / each).is_file() for each in files)
    assert (config.method.patch, config.method.pitch) == (2, 2)
    if name == "8x80gb":
        method = config.method
        assert (method.width, method.layers, config.run.iterations) == (1024, 24, 100_000)  # as stated
        assert (config.data.batch_size, config.data.batch_size % (8 * config.memory.accumulation)) == (24, 0)


@pytest.mark.parametrize("file", VIDEOSCENE, ids=lambda file: file.stem)
def test_the_leaps_files_are_whole(file):
    config = read_stage_config("leap", file, ["out=unused"])
    assert config.name == "leap" and config.method.t <= config.method.t_max == 599
    header = file.read_text().split("\n\n")[0]
    files = re.findall(r"recipes/[\w/]+\.(?:py|yaml|json)", header)
    assert files and all((REPOSITORY / name).is_file() for name in files)
    if file.stem != "tiny":
        lines = file.read_text().splitlines()
        keys = [number for number, line in enumerate(lines) if re.match(r"\s*\w+: \S", line)]
        explained = [number for number in keys if lines[number - 1].strip().startswith("# ")]
        assert len(keys) > 10 and len(explained) >= len(keys) - 2
        assert (config.optim["student"].weight_decay, config.run.iterations) == (0.01, 20000)


def test_the_papers_leap_has_what_it_states():
    config = read_stage_config("leap", CONFIGS / "videoscene" / "8x80gb.yaml", ["out=unused"])
    assert (config.optim["student"].lr, config.method.trained, config.data.batch_size) == (3e-5, "attn1", 16)
    assert config.method.start == "render" and config.memory.precision == "bfloat16"
