"""Settings: what is read, and that everything wrong gives one sentence with a place and a cure."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fvgen.distill import read_stage_config, read_yaml, run_config, stage_config
from fvgen.distill.config import known_words, parse_overrides
from fvgen.distill.settings import Run
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
    assert (gan.name, gan.run.out, gan.run.iterations, gan.data.batch_size) == ("gan", "runs/a", 7, 2)
    assert gan.optim["student"].lr == 1e-4 and gan.optim.keys() == {"student", "head"}
    assert (dmd.name, dmd.run.out, dmd.run.iterations, dmd.data.batch_size) == ("dmd", "runs/b", 9, 1)
    assert dmd.optim["fake_score"].lr == 3e-5
    assert read_stage_config("dmd", file, ["out=b"]).optim["fake_score"].lr == 2e-5
    assert gan.run.seed == Run.model_fields["seed"].default


def test_the_method_may_be_named_in_the_file(file):
    file.write_text("method: dmd\nout: a\n")
    assert read_stage_config(None, file, []).name == "dmd"
    assert read_stage_config(None, file, ["method=gan"]).name == "gan"
    file.write_text("out: a\n")
    with pytest.raises(UserError, match="names no method; add method="):
        read_stage_config(None, file, [])


def test_an_optimisers_settings_hold_for_all_or_for_one_learner(file):
    config = read_stage_config("dmd", file, ["out=a", "beta1=0.5", "head_beta1=0.1", "head_weight_decay=0"])
    assert {name: optimizer.beta1 for name, optimizer in config.optim.items()} == {
        "student": 0.5,
        "head": 0.1,
        "fake_score": 0.5,
    }
    assert config.optim["head"].weight_decay == 0 and config.optim["student"].weight_decay > 0
    assert stage_config("dmd", config.words()) == config


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4", "+1e-4"])
def test_every_way_to_write_a_number(file, text):
    assert read_stage_config("gan", file, ["out=a", f"head_lr={text}"]).optim["head"].lr == 1e-4
    file.write_text(f"out: a\nhead_lr: {text}\n")
    assert read_stage_config("gan", file, []).optim["head"].lr == 1e-4


@pytest.mark.parametrize("name", ["2024", "1e5", "null", "0x10", "true", "a=b", "runs/a: b", "[x"])
def test_names_stay_names(file, name):
    assert read_stage_config("gan", file, [f"out={name}"]).run.out == name


def test_quoted_names_of_a_file_stay_names(file):
    file.write_text('out: "2024"\ndata: "1e5"\n')
    config = read_stage_config("gan", file, [])
    assert (config.run.out, config.data.data) == ("2024", "1e5")


def test_null_takes_the_teachers_own_guidance(file):
    assert read_stage_config("dmd", file, ["out=a", "guidance=2"]).method.guidance == 2
    assert read_stage_config("dmd", file, ["out=a", "guidance=2", "guidance=null"]).method.guidance is None


def test_a_saved_configuration_can_be_read_again():
    config = stage_config("dmd", {"out": "a", "guidance": 3.5, "student_steps": 2})
    assert stage_config("dmd", config.words()) == config


def test_both_stages_of_the_tiny_preset():
    settings = read_yaml(str(files("fvgen") / "configs" / "tiny.yaml"))
    config = run_config({**settings, "seed": 3}, "runs/demo")
    assert (config.gan.name, config.dmd.name) == ("gan", "dmd")
    assert (config.gan.run.out, config.dmd.run.out) == ("runs/demo/stage1_gan", "runs/demo/stage2_dmd")
    assert (config.gan.run.init, config.dmd.run.init) == ("", config.gan.run.out)
    assert config.gan.run.seed == config.dmd.run.seed == 3
    assert config.dmd.run.iterations == settings["dmd"]["iterations"]


def test_settings_cannot_change_afterwards():
    config = stage_config("gan", {"out": "a"})
    with pytest.raises(ValueError):
        config.run.seed = 1


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
    "t_min=980": "command line: t_min=980 lies above t_max=979",
    "head_warmup=7": "command line: head_warmup=7 leaves the student none of 7 iterations",
    "student_lora=true": "command line: student_lora=true needs share_backbone=true",
    "method=dmd": "command line: method='dmd', but this is stage 'gan'",
    "out=": "out='': string should have at least 1 character",
}


@pytest.mark.parametrize("word", WORDS)
def test_wrong_words_on_the_command_line(file, word):
    with pytest.raises(UserError) as error:
        read_stage_config("gan", file, ["out=a", word])
    assert WORDS[word] in sentence(error)


def test_a_word_that_makes_the_files_idle_is_to_blame(file):
    file.write_text(FILE + "divergence: jeffreys\n")
    with pytest.raises(UserError) as error:
        read_stage_config("dmd", file, ["out=a", "dmd_weight=0"])
    assert sentence(error).startswith("command line: divergence has no effect where dmd_weight is 0; remove it from ")
    with pytest.raises(UserError) as error:  # ... and no word that has nothing to do with it
        read_stage_config("gan", file, ["out=a"])
    assert sentence(error).startswith(f"{file}: divergence has no effect")
    file.write_text("student_lora: true\n")
    with pytest.raises(UserError) as error:  # whose sentence speaks of "the shared teacher"
        read_stage_config("dmd", file, ["out=a", "teacher=tiny"])
    assert sentence(error).startswith(f"{file}: student_lora=true needs share_backbone=true")


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
    "method: dmd": "method='dmd', but this is stage 'gan'",
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


# --- One method, by its settings with and without its parts ---


@pytest.mark.parametrize(
    ("name", "changes", "learners"),
    [
        ("gan", {}, {"student", "head"}),
        ("dmd", {}, {"student", "head", "fake_score"}),
        ("dmd", {"gan_weight": 0.0}, {"student", "head", "fake_score"}),  # the head weighs the matching loss
        ("dmd", {"gan_weight": 0.0, "divergence": "reverse_kl"}, {"student", "fake_score"}),
        ("dmd", {"dmd_weight": 0.0}, {"student", "head"}),
        ("gan", {"gan_weight": 0.0, "regression_weight": 1.0}, {"student"}),
    ],
)
def test_who_learns_follows_from_the_settings(name, changes, learners):
    config = stage_config(name, {"out": "a", **changes})
    assert config.optim.keys() == learners
    assert stage_config(name, config.words()) == config


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gan", {"divergence": "jeffreys"}, "divergence has no effect where dmd_weight is 0; remove it"),
        ("gan", {"guidance": 2.0}, "guidance has no effect where dmd_weight is 0"),
        ("gan", {"dmd_weight": 1.0}, "method gan has dmd_weight=0.0; remove dmd_weight=1.0"),
        ("gan", {"fake_score_lr": 1e-4}, "fake_score_lr has no effect where no fake_score learns"),
        ("dmd", {"r1_sigma": 0.1}, "r1_sigma has no effect where r1_weight is 0"),
        ("dmd", {"gan_weight": 0.0, "divergence": "reverse_kl", "head_channels": 8}, "where no head learns"),
        ("dmd", {"gan_weight": 0.0, "divergence": "reverse_kl", "head_lr": 1e-3}, "where no head learns"),
        ("lalrm", {"lr_warmup": 7, "iterations": 7}, "lr_warmup=7 of iterations=7 leaves none at lalrm_lr; set less"),
        ("gan", {"head_lr_warmup": 9, "iterations": 7}, "head_lr_warmup=9 of iterations=7 leaves none at head_lr"),
        ("nothing", {}, "there is no method 'nothing'; known are camera, consistency, control-frozen-head,"),
    ],
)
def test_settings_without_effect_are_refused_by_name(name, changes, words):
    with pytest.raises(UserError) as error:
        stage_config(name, {"out": "a", **changes})
    assert words in sentence(error)


@given(st.sampled_from(sorted(known_words("gan"))), st.text())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_setting_or_a_sentence(key, text):
    try:
        config = stage_config("gan", {"out": "a", **parse_overrides([f"{key}={text}"])})
    except UserError as error:
        assert "\n" not in str(error)
    else:
        words = config.words()
        # A learner's own value that the others have, too, is said once.
        same_for_all = key not in words and key.startswith(("head_", "student_"))
        assert same_for_all or words[key] is not None or key == "fused"
