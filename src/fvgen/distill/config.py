"""From flat ``key: value`` lines to the settings of a stage, judged before any work starts.

The page is flat because people read it; a stage's `StageConfig` has an owner for each setting (`fvgen.distill.settings`
and, for the method's own, `fvgen.distill.methods`).
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fvgen.distill.methods import METHODS, method_named
from fvgen.distill.settings import OWNERS, SHARED, Optimizer, Owner, StageConfig
from fvgen.errors import UserError, did_you_mean, short
from fvgen.system import doors


@dataclass(frozen=True)
class Origin:
    """Where settings stand: in ``file``, but for those in ``overrides``, which come from the command line."""

    file: str = "settings"
    overrides: Container[str] = ()

    def of(self, key: Any) -> str:
        """Where one setting stands."""
        return "command line" if key in self.overrides else self.file

    def of_all(self, sentence: str) -> str:
        """What is to blame for a sentence that names several: the command line, where any of them stands there."""
        named = re.findall(r"\w+_\w+|\w+(?==)", sentence)  # "teacher" may be a plain word, "t_min" and "teacher=" not
        return "command line" if any(word in self.overrides for word in named) else self.file


class RunConfig(BaseModel):
    """Both of FVGen's stages: ``out/stage1_gan``, then ``out/stage2_dmd`` starting from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gan: StageConfig
    dmd: StageConfig


def stage_config(
    name: str, settings: Mapping[str, Any], where: str = "settings", overrides: Container[str] = ()
) -> StageConfig:
    """A judged `StageConfig` of the method ``name``. Raises UserError that names the first wrong setting, where it
    stands and the cure.

    ``where`` the settings stand, except for those in ``overrides``, which come from the command line.
    """
    row, settings, origin = method_named(name), dict(settings), Origin(where, overrides)
    if (found := settings.pop("method", name)) != name:
        raise UserError(f"{origin.of('method')}: method={short(found)}, but this is stage {name!r}; remove the setting")
    _check_names(name, settings, origin)
    for key, value in row.fixed.items():
        if settings.setdefault(key, value) != value:
            raise UserError(f"{origin.of(key)}: method {name} has {key}={value!r}; remove {key}={short(settings[key])}")
    owners = {
        owner: _judged(kind, {key: settings[key] for key in kind.model_fields if key in settings}, origin)
        for owner, kind in {**OWNERS, "method": row.settings}.items()
    }
    method = owners["method"]
    for key, why in method.idle().items():
        if key in settings and key not in row.fixed:
            blamed = origin.of_all(f"{key}= {why}")
            rest = "" if blamed == origin.of(key) else f" from {where}"
            raise UserError(f"{blamed}: {key} has no effect {why}; remove it{rest}")
    optim = {learner: _optimizer(learner, settings, origin, row.settings.optimizer) for learner in method.learners()}
    for learner in set(row.settings.all_learners) - set(optim):
        for key in Optimizer.model_fields:
            if f"{learner}_{key}" in settings:
                word = f"{learner}_{key}"
                raise UserError(f"{origin.of(word)}: {word} has no effect where no {learner} learns; remove it")
    total = owners["run"].iterations
    for learner, optimizer in optim.items():
        if optimizer.lr_warmup >= total:
            word = f"{learner}_lr_warmup" if f"{learner}_lr_warmup" in settings else "lr_warmup"
            rest = f"of iterations={total} leaves none at {learner}_lr; set less"
            raise UserError(f"{origin.of(word)}: {word}={optimizer.lr_warmup} {rest}")
    try:
        method.judge(owners["run"], owners["data"], owners["memory"])
    except ValueError as error:
        raise UserError(f"{origin.of_all(str(error))}: {error}") from None
    return StageConfig(name=name, optim=optim, **owners)


def changed(config: StageConfig, **words: Any) -> StageConfig:
    """The same with some settings changed, judged again; what these make idle is left out."""
    kind, merged = METHODS[config.name].settings, {**config.words(), **words}
    after = _judged(kind, {key: merged[key] for key in kind.model_fields if key in merged}, Origin())
    gone = set(config.optim) - {*after.learners()}
    idle = {*after.idle(), *(f"{learner}_{key}" for learner in gone for key in Optimizer.model_fields)}
    return stage_config(config.name, {key: value for key, value in merged.items() if key in words or key not in idle})


def run_config(settings: dict[str, Any], out: str | Path, where: str = "settings") -> RunConfig:
    """Both stages from one mapping: common settings on top, departures of a stage under ``gan`` and ``dmd``."""
    first = Path(out) / "stage1_gan"
    gan = stage_config("gan", {**_section(settings, "gan", where), "out": str(first)}, where)
    dmd_settings = {**_section(settings, "dmd", where), "out": str(Path(out) / "stage2_dmd"), "init": str(first)}
    return RunConfig(gan=gan, dmd=stage_config("dmd", dmd_settings, where))


def read_stage_config(name: str | None, file: str | Path, overrides: Sequence[str]) -> StageConfig:
    """A recipe's settings: the YAML ``file``, its section for the method, then ``key=value`` words; the last wins.

    ``name`` None takes the method that file or words name.
    """
    words, settings = parse_overrides(overrides), read_yaml(file)
    settings.pop("stages", None)  # one of them is asked for
    if name is None:
        name = words.get("method", settings.get("method"))
        if not isinstance(name, str):
            raise UserError(f"{file} names no method; add method=..., one of {', '.join(METHODS)}")
    settings = _section(settings, name, str(file))
    return stage_config(name, {**settings, **words}, str(file), words)


def read_stages(file: str | Path, overrides: Sequence[str]) -> list[StageConfig]:
    """The stages of a method file, judged, each starting from the one before: common settings on top, a section by
    method name for each of ``stages: [gan, dmd]``. ``out`` is the folder of all; stage k gets ``out/stage<k>_<name>``.

    Overrides hold for all stages that know the setting; ``dmd.iterations=20`` is for one. Raises UserError.
    """
    where, words, settings = str(file), parse_overrides(overrides), read_yaml(file)
    names = settings.pop("stages", None)
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise UserError(f"{where}: stages is {short(names)}; write the methods in order, as stages: [gan, dmd]")
    for name in names:
        method_named(name)
    out = words.pop("out", settings.pop("out", None))
    if not out:
        raise UserError(f"{where}: out is not given; add out=DIR")
    special = {word: value for word, value in words.items() if "." in word and word.partition(".")[0] in names}
    common = {word: value for word, value in words.items() if word not in special}
    for word in common:
        if not any(word in known_words(name) for name in names):
            raise UserError(f"command line: unknown setting {word!r}; the stages are {', '.join(names)}")
    configs: list[StageConfig] = []
    for number, name in enumerate(names, start=1):
        given = {word: value for word, value in common.items() if word in known_words(name)}
        given |= {word.partition(".")[2]: value for word, value in special.items() if word.partition(".")[0] == name}
        before = {"init": configs[-1].run.out} if configs else {}
        folder = {"out": str(Path(out) / f"stage{number}_{name}")}
        section = _section(settings, name, where)
        configs.append(stage_config(name, {**section, **before, **given, **folder}, where, given))
    return configs


def read_yaml(file: str | Path) -> dict[str, Any]:
    """A YAML mapping; raises UserError for a file that is missing or something else."""
    settings = doors.read_yaml(file, "give a YAML file of settings", "config file")
    if not isinstance(settings, dict):
        raise UserError(f"config file {file} holds no 'key: value' lines; give a YAML file of settings")
    return settings


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """``["head_lr=1e-4", "out=runs/a"]`` to a mapping. Values are read as YAML, except that names stay names (a folder
    may be called 2024) and 1e-4 is a number."""
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{short(word)} is no setting; write key=value, for example iterations=200")
        settings[key] = _value(key, value)
    return settings


def known_words(name: str) -> set[str]:
    """All settings that a method can have."""
    own = METHODS[name].settings
    fields = {key for kind in (*OWNERS.values(), own) for key in kind.model_fields}
    return fields | {*SHARED} | {f"{learner}_{key}" for learner in own.all_learners for key in Optimizer.model_fields}


def _check_names(name: str, settings: Mapping[str, Any], origin: Origin) -> None:
    known = known_words(name)
    for key in settings:
        if key in known:
            continue
        for other in METHODS:
            if key in known_words(other):
                raise UserError(f"{origin.of(key)}: {key} is a setting of method {other}, not of {name}; remove it")
        of_one = {f"{learner}_{key}" for learner in METHODS[name].settings.all_learners for key in SHARED}
        near = {*known, *METHODS} - {key} - of_one  # a list of all would be twice as long
        raise UserError(f"{origin.of(key)}: unknown setting {short(key)}{did_you_mean(str(key), near)}")


def _optimizer(
    learner: str, settings: Mapping[str, Any], origin: Origin, usual: Mapping[str, Any] | None = None
) -> Optimizer:
    """Of one learner: its own settings before those for all, and those before the method's ``usual`` ones."""
    words = {key: f"{learner}_{key}" for key in Optimizer.model_fields}
    given = {key: settings[word] for key, word in words.items() if word in settings}
    shared = {key: settings[key] for key in SHARED if key in settings and key not in given}
    names = {key: words[key] for key in {*given, "lr"}}
    return _judged(Optimizer, {**(usual or {}), **shared, **given}, origin, names)


def _judged(kind: type[Owner], given: Mapping[str, Any], origin: Origin, words: Mapping[str, str] | None = None) -> Any:
    """``words``: how a field is called on the page where that differs."""
    try:
        return kind(**given)
    except ValidationError as error:
        first = error.errors()[0]
        key = first["loc"][0] if first["loc"] else None
        key = (words or {}).get(key, key)
        if first["type"] == "missing":
            raise UserError(f"{origin.file}: {key} is not given; add {key}=...") from None
        problem = first["msg"].removeprefix("Value error, ")
        place = origin.of_all(problem) if key is None else origin.of(key)
        value = "" if key is None else f"{key}={short(first['input'])}: "
        raise UserError(f"{place}: {value}{problem[0].lower() + problem[1:]}") from None


def _value(key: str, text: str) -> Any:
    if _is_name(key):
        return text
    try:
        return _number(key, doors.parse_yaml(text, key))
    except UserError:
        word = short(f"{key}={text}")
        raise UserError(f"the value in {word} cannot be read; quote it or write a plain number or word") from None


def _section(settings: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    common = {key: value for key, value in settings.items() if key not in METHODS}
    section = settings.get(name)
    if section is None:
        section = {}
    if not isinstance(section, dict):
        raise UserError(f"{where}: section {name!r} holds no 'key: value' lines; indent its settings below it")
    return {key: _number(key, value) for key, value in {**common, **section}.items()}


def _is_name(key: str) -> bool:
    kinds = (*OWNERS.values(), *(row.settings for row in METHODS.values()))
    fields = [kind.model_fields[key] for kind in kinds if key in kind.model_fields]
    return key == "method" or any(field.annotation is str for field in fields)


def _number(key: str, value: Any) -> Any:
    """YAML 1.1 takes 1e-4 for a word."""
    try:
        return float(value) if isinstance(value, str) and not _is_name(key) else value
    except ValueError:
        return value
