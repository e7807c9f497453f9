"""Wrong command lines of every command: one sentence that names what is wrong, exit code 2, nothing written.

In this process, through the door that the `fvgen` program has. What takes a run to go wrong is in test_bad_input.py.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from fvgen.cli import app, main
from fvgen.errors import UserError
from fvgen.system.command import Parser

# A line as it is typed, in a folder with the files of `folder`; what the sentence has to say.
LINES = {
    "dmeo --out o": "No such command 'dmeo'",
    "--verbose": "No such option: --verbose",
    # demo
    "demo": "Missing option '--out'",
    "demo --out": "Option '--out' requires an argument",
    "demo o": "Missing option '--out'",
    "demo --out o --data none": "data folder none does not exist",
    "demo --out o --held-out none": "data folder none does not exist",
    "demo --out o --teacher huge": "huge is no model folder",
    "demo --out o --frames 1": "Invalid value for '--frames'",
    "demo --out o --frames eight": "Invalid value for '--frames'",
    "demo --out o --size 320": "--size '320' is not understood; write, for example, 320x512",
    "demo --out o --size 0x64": "--size '0x64' is not understood",
    "demo --out o --size 48*64": "--size '48*64' is not understood",
    "demo --out o --seed -1": "Invalid value for '--seed'",
    "demo --out o --device gpu": "device 'gpu' cannot be used here",
    "demo --out note.txt": "note.txt",
    # convert
    "convert --out m": "Missing option '--checkpoint'",
    "convert --checkpoint x.ckpt --out m": "converting a checkpoint needs its yaml; add --config",
    "convert --config none.yaml --checkpoint x.ckpt --out m": "--config none.yaml does not exist",
    "convert --to-lvdm --layout ends --checkpoint x --out m": "a model folder says its own layout",
    "convert --config note.txt --checkpoint none.ckpt --out m": "the yaml note.txt is damaged",
    "convert --config note.txt --checkpoint note.txt --only unet,ear --out m": "ear",
    # prepare
    "prepare --out o": "Missing argument 'SOURCES",
    "prepare empty": "Missing option '--out'",
    "prepare none --out o": "data folder none does not exist",
    "prepare empty --out o": "empty",
    "prepare empty --out o --size tall": "--size 'tall' is not understood",
    "prepare empty --out o --part 3": "--part '3' is not understood; write, for example, 2/8",
    "prepare empty --out o --workers 0": "Invalid value for '--workers'",
    "prepare empty --out o --max-stride 0": "Invalid value for '--max-stride'",
    "prepare empty --out o --teacher none": "none is no model folder",
    # inspect
    "inspect": "Missing argument 'PATH'",
    "inspect none": "data folder none does not exist",
    "inspect note.txt": "note.txt",
    "inspect empty --clips 0": "Invalid value for '--clips'",
    "inspect empty --teacher none": "none is no model folder",
    # generate
    "generate --out o": "Missing argument 'PHOTOGRAPHS",
    "generate one.png": "Missing option '--out'",
    "generate none.jpg --out o": "photograph none.jpg does not exist",
    "generate note.txt --out o": "note.txt",
    "generate one.png --out o --frames 0": "frames",
    "generate one.png --out o --steps 0": "steps",
    "generate one.png --out o --model none": "none is no model folder",
    "generate one.png --out o --trajectory circle": "circle",
    "generate one.png --out o --points radar": "radar",
    "generate one.png --out o --seams glue": "glue",
    "generate one.png --out o --size 7x9": "7x9",
    "generate one.png --out one.png": "one.png",
    # evaluate
    "evaluate": "Missing argument 'PREDICTED'",
    "evaluate none none": "data folder none does not exist",
    "evaluate empty empty": "empty",
    "evaluate one.png": "one.png",
    # reconstruct
    "reconstruct": "Missing argument 'DATASET'",
    "reconstruct none": "data folder none does not exist",
    "reconstruct empty": "empty",
    "reconstruct note.txt": "note.txt",
    "reconstruct empty --size big": "--size 'big' is not understood",
    # export
    "export run": "Missing option '--out'",
    "export none --out o": "run folder none does not exist",
    "export empty --out o": "empty",
    "export empty --out o --iteration 0": "Invalid value for '--iteration'",
    # plan
    "plan": "Missing option '--config'",
    "plan --config none.yaml": "--config none.yaml does not exist",
    "plan --config note.txt": "note.txt",
    "plan --config good.yaml --stage warm": "--stage warm: there are gan and dmd",
    "plan --config good.yaml --gpus 0": "Invalid value for '--gpus'",
    "plan --config good.yaml --size 320": "--size '320' is not understood",
    "plan --config good.yaml --height 320": "--height has another name now; write --size HEIGHTxWIDTH",
    "plan --config good.yaml lr=1": "unknown setting 'lr'",
    "plan --config good.yaml batch_size=many": "batch_size='many'",
    # policy
    "policy": "Missing argument 'RUN'",
    "policy none": "none",
    "policy empty": "empty",
    "policy empty --method guess": "guess",
    "policy empty --clips 0": "Invalid value for '--clips'",
    "policy empty --lpips -1": "Invalid value for '--lpips'",
    # diagnose
    "diagnose": "Missing argument 'RUN'",
    "diagnose none": "run folder none does not exist",
    "diagnose empty": "empty",
    "diagnose note.txt": "note.txt",
    "diagnose empty --format yaml": "No such option: --format",
    # report
    "report": "Missing argument 'RUNS",
    "report none": "run folder none does not exist",
    "report empty": "empty",
    "report empty empty": "empty",
    # ui
    "ui --port 99999": "Invalid value for '--port'",
    "ui --port http": "Invalid value for '--port'",
    "ui --max-photographs 51": "Invalid value for '--max-photographs'",
    "ui --jobs 0": "Invalid value for '--jobs'",
    "ui --share": "No such option: --share",
    # doctor
    "doctor --jsn": "No such option: --jsn",
    "doctor me": "(me)",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder, a photograph, a text, and settings; the working folder."""
    from PIL import Image

    (tmp_path / "empty").mkdir()
    Image.effect_noise((64, 48), 90).convert("RGB").save(tmp_path / "one.png")
    (tmp_path / "note.txt").write_text("a note: [\n")
    (tmp_path / "good.yaml").write_text("teacher: tiny\ndata: builtin\nbatch_size: 8\n")
    monkeypatch.setenv("FVGEN_CACHE", str(tmp_path.parent / "cache"))
    monkeypatch.delenv("FVGEN_DOWNLOAD", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_line_gets_a_sentence(folder, monkeypatch, capsys, line):
    before = {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    monkeypatch.setattr(sys, "argv", ["fvgen", *shlex.split(line)])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    said = [row for row in printed.err.splitlines() if row.startswith("fvgen: ")]
    # How typer writes an argument's name depends on its version.
    assert end.value.code == 2 and len(said) == 1 and LINES[line].lower() in said[0].lower(), printed
    assert len(said[0]) < 700 and "Traceback" not in printed.err + printed.out
    assert {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")} == before


def test_every_command_has_its_lines():
    named = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert named <= {line.split()[0] for line in LINES} and len(LINES) >= 40


def test_benchmarks_tell_the_new_names_of_options_too():
    with pytest.raises(UserError, match="--weight has another name now; write --generated-weight"):
        Parser("", {"--weight": "--generated-weight"}).parse_args(["--weight", "1"])
    with pytest.raises(UserError, match="unrecognized arguments: --wait; see --help"):
        Parser("", {"--weight": "--generated-weight"}).parse_args(["--wait"])
