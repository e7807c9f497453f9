"""Settings: what is read, and that everything wrong gives one sentence with a place and a cure."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fvgen.distill import StageConfig, read_stage_config, read_yaml, run_config, stage_config
from fvgen.distill.config import parse_overrides
from fvgen.errors import UserError

FILE = """
batch_size: 2
student_lr: 1e-4
gan:
  iterations: 7
dmd:
  iterations: 9
  fake_score_lr: 2E-5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(FILE)
    return path


def sentence(error: pytest.ExceptionInfo) -> str:
    """The message, which must be one line of bounded length."""
    message = str(error.value)
    assert "\n" not in message and len(message) < 900, message
    return message


# --- What is read ---


def test_a_section_goes_over_the_top_and_the_command_line_over_both(file):
    gan = read_stage_config("gan", file, ["out=runs/a"])
    dmd = read_stage_config("dmd", file, ["out=runs/b", "batch_size=3", "fake_score_lr=3e-5", "batch_size=1"])
    assert (gan.stage, gan.out, gan.iterations, gan.batch_size, gan.student_lr) == ("gan", "runs/a", 7, 2, 1e-4)
    assert (dmd.stage, dmd.out, dmd.iterations, dmd.batch_size, dmd.fake_score_lr) == ("dmd", "runs/b", 9, 1, 3e-5)
    assert read_stage_config("dmd", file, ["out=b"]).fake_score_lr == 2e-5
    assert gan.seed == StageConfig.model_fields["seed"].default


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4", "+1e-4"])
def test_every_way_to_write_a_number(file, text):
    assert read_stage_config("gan", file, ["out=a", f"head_lr={text}"]).head_lr == 1e-4
    file.write_text(f"out: a\nhead_lr: {text}\n")
    assert read_stage_config("gan", file, []).head_lr == 1e-4


@pytest.mark.parametrize("name", ["2024", "1e5", "null", "0x10", "true", "a=b", "runs/a: b", "[x"])
def test_names_stay_names(file, name):
    assert read_stage_config("gan", file, [f"out={name}"]).out == name


def test_quoted_names_of_a_file_stay_names(file):
    file.write_text('out: "2024"\ndata: "1e5"\n')
    config = read_stage_config("gan", file, [])
    assert (config.out, config.data) == ("2024", "1e5")


def test_null_takes_the_teachers_own_guidance(file):
    assert read_stage_config("dmd", file, ["out=a", "guidance=2"]).guidance == 2
    assert read_stage_config("dmd", file, ["out=a", "guidance=2", "guidance=null"]).guidance is None


def test_a_saved_configuration_can_be_read_again():
    config = stage_config("dmd", {"out": "a", "guidance": 3.5, "student_steps": 2})
    assert stage_config("dmd", config.model_dump()) == config


def test_both_stages_of_the_tiny_preset():
    settings = read_yaml(str(files("fvgen") / "configs" / "tiny.yaml"))
    config = run_config({**settings, "seed": 3}, "runs/demo")
    assert (config.gan.stage, config.dmd.stage) == ("gan", "dmd")
    assert (config.gan.out, config.dmd.out) == ("runs/demo/stage1_gan", "runs/demo/stage2_dmd")
    assert (config.gan.init, config.dmd.init) == ("", config.gan.out)
    assert config.gan.seed == config.dmd.seed == 3
    assert config.dmd.iterations == settings["dmd"]["iterations"]


def test_settings_cannot_change_afterwards():
    config = stage_config("gan", {"out": "a"})
    with pytest.raises(ValueError):
        config.seed = 1


# --- What is refused ---

WORDS = {
    "iteratoins=5": "command line: unknown setting 'iteratoins'; did you mean 'iterations'?",
    "lr=1e-4": "command line: unknown setting 'lr'",
    "dmb=1": "unknown setting 'dmb'; did you mean 'dmd'?",
    "iterations": "'iterations' is no setting; write key=value",
    "=5": "'=5' is no setting",
    "iterations=many": "command line: iterations='many': input should be a valid integer",
    "iterations=2.5": "iterations=2.5: input should be a valid integer",
    "iterations=": "iterations=None: input should be a valid integer",
    "iterations=true": "iterations=True: input should be a valid integer",
    "iterations=0": "iterations=0: input should be greater than or equal to 1",
    "iterations=[1": "the value in 'iterations=[1' cannot be read",
    "iterations=2001-99-99": "cannot be read",
    "iterations=" + 1000 * "[": "cannot be read",
    "iterations=[1, 2]": "iterations=[1, 2]: input should be a valid integer",
    "student_lr=-1": "student_lr=-1: input should be greater than 0",
    "student_lr=.inf": "student_lr=inf: input should be a finite number",
    "student_lr=nan": "student_lr=nan: input should be a finite number",
    "student_steps=3": "student_steps=3: input should be 1, 2, 4 or 8",
    "student_input=noise": "student_input='noise': input should be 'noised' or 'simulated'",
    "beta1=1": "beta1=1: input should be less than 1",
    "head_channels=12": "head_channels=12: input should be a multiple of 8",
    "seed=-1": "seed=-1",
    "seed=99999999999999999999999": "seed=99999999999999999999999",
    "t_max=1000": "t_max=1000",
    "divergence=softened_reverse_lk": "divergence='softened_reverse_lk' is unknown; did you mean 'softened_reverse_kl'?",  # noqa: E501
    "gan_kind=wasserstein": "gan_kind='wasserstein' is unknown; known are",
    "t_min=980": "t_min=980 lies above t_max=979",
    "head_warmup=7": "head_warmup=7 leaves the student none of 7 iterations",
    "stage=dmd": "command line: stage='dmd', but this is stage 'gan'",
    "out=": "out='': string should have at least 1 character",
}


@pytest.mark.parametrize("word", WORDS)
def test_wrong_words_on_the_command_line(file, word):
    with pytest.raises(UserError) as error:
        read_stage_config("gan", file, ["out=a", word])
    assert WORDS[word] in sentence(error)


FILES = {
    "batch_sise: 2": "settings.yaml: unknown setting 'batch_sise'; did you mean 'batch_size'?",
    "batch_size: two": "settings.yaml: batch_size='two': input should be a valid integer",
    "out: 2024": "settings.yaml: out=2024: input should be a valid string",
    "gan:\n  iteration: 3": "unknown setting 'iteration'; did you mean 'iterations'?",
    "gan: 3": "settings.yaml: section 'gan' holds no 'key: value' lines",
    "gan: []": "settings.yaml: section 'gan' holds no 'key: value' lines",
    "- batch_size": "settings.yaml holds no 'key: value' lines",
    "": "settings.yaml holds no 'key: value' lines",
    "batch_size: [": "settings.yaml cannot be read",
    "a: 1\n b: 2": "settings.yaml cannot be read",
    "when: 2001-99-99": "settings.yaml cannot be read",
    "1: 2": "unknown setting 1",
    "stage: dmd": "stage='dmd', but this is stage 'gan'",
}


@pytest.mark.parametrize("text", FILES)
def test_wrong_files(file, text):
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read_stage_config("gan", file, [] if text.startswith("out") else ["out=a"])
    assert FILES[text] in sentence(error)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(UserError) as error:
            read_stage_config("gan", path, [])
        assert f"config file {path} cannot be read" in sentence(error)


def test_a_missing_setting_is_named(file):
    with pytest.raises(UserError) as error:
        read_stage_config("gan", file, [])
    assert sentence(error) == f"{file}: out is not given; add out=..."


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("gan", {"gan_weight": 0.0}),
        ("dmd", {"gan_weight": 0.0, "dmd_weight": 0.0}),
        ("gan", {"regression_weight": 1.0, "student_input": "simulated"}),
    ],
)
def test_settings_that_cannot_work_together(stage, changes):
    with pytest.raises(UserError) as error:
        stage_config(stage, {"out": "a"} | changes)
    assert "regression_weight" in sentence(error)


def test_settings_that_work_together_after_all():
    stage_config("gan", {"out": "a", "gan_weight": 0.0, "regression_weight": 1.0})
    stage_config("dmd", {"out": "a", "gan_weight": 0.0})


@given(st.sampled_from(sorted(StageConfig.model_fields)), st.text())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_setting_or_a_sentence(key, text):
    try:
        config = stage_config("gan", {"out": "a", **parse_overrides([f"{key}={text}"])})
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert getattr(config, key) is not None or key in ("guidance", "fused")
