"""Model folders by name: teachers that ship with the package, or any folder of the user's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import diffusers
import torch
import transformers
from diffusers import ModelMixin

from fvgen.errors import UserError, first_line, short
from fvgen.models.family import Blueprint, Family, family_of
from fvgen.models.head import DiscriminatorHead
from fvgen.models.viewcrafter.pipelines import NovelViewPipeline
from fvgen.pipelines.presets import model_folder
from fvgen.pipelines.strict import DAMAGE, INDEX, check_values, judge_folder, load_alone
from fvgen.system.doors import other_kind, read_object
from fvgen.system.files import atomic_path, write_json

P = TypeVar("P", bound=NovelViewPipeline)


def load_pipeline(name: str | Path, kind: type[P], **parts: torch.nn.Module | None) -> P:
    """A pipeline in float32, whatever type its weights are stored in; ``parts`` are taken as given and not read.

    ``kind``: `TeacherPipeline`, `StudentPipeline` or a family's own class.

    Raises UserError for a folder that is damaged, of a family that is not known, or holds another kind of pipeline; see
    `fvgen.pipelines.strict`.
    """
    folder = model_folder(name)
    found = model_kind(folder)
    family = family_of(found)
    if family is None or not issubclass(pipeline_class := family.pipeline(found), kind):
        raise UserError(
            f"{folder} holds a {found[:100]}, but a {kind.__name__} is needed here; give another model folder"
        )
    with quiet():
        try:
            pipeline = pipeline_class.from_pretrained(folder, local_files_only=True, **parts)
        except UserError:
            raise
        except DAMAGE as error:
            raise damaged(folder, error) from error
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.float()  # the argument for it has one name in older versions of diffusers and another in newer ones
    return pipeline


def save_model(model: NovelViewPipeline | ModelMixin, folder: str | Path) -> None:
    """Write a pipeline or a network as a folder, whole or not at all. Raises UserError when the disk is full, and for a
    network that diverged: nobody shall find NaN in a finished student."""
    parts = model.components if isinstance(model, NovelViewPipeline) else {"network": model}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            check_values(part, f"{name} of {folder}, which was not written")
    with quiet(), atomic_path(folder) as temporary:
        model.save_pretrained(temporary)
        for file in [*Path(temporary).rglob("config.json"), *Path(temporary).glob("model_index.json")]:
            settings = read_object(file)
            settings.pop("_name_or_path", None)  # a folder of the machine that the part was loaded on
            write_json(file, settings, sort_keys=True)


def load_head(folder: str | Path) -> DiscriminatorHead:
    """A discriminator head in float32. Raises UserError for a damaged folder."""
    with quiet():
        try:
            return load_alone(folder, DiscriminatorHead).float()
        except UserError:
            raise
        except DAMAGE as error:
            raise damaged(folder, error) from error


def model_kind(folder: Path) -> str:
    """The class name that ``model_index.json`` gives."""
    try:
        name = read_object(folder / INDEX)["_class_name"]
    except (UserError, KeyError) as error:
        raise UserError(f"{folder / INDEX} is damaged; write or copy the model again") from error
    if not isinstance(name, str):
        raise UserError(f"{folder / INDEX} is damaged: its class is {short(name)}; write or copy the model again")
    return name


def folder_blueprint(folder: Path) -> tuple[Family, Blueprint]:
    """Family and blueprint of the model in a folder, from its JSON files alone.

    Raises UserError for a damaged one, and for one that no family knows.
    """
    kind = model_kind(folder)
    family = family_of(kind)
    if family is None:
        raise UserError(f"{folder} holds a {kind[:100]}, which no family knows; give another model folder")
    try:
        judge_folder(folder, family.pipeline(kind))
        files = {"": read_object(folder / INDEX)}
        files |= {file.parent.name: read_object(file) for file in sorted(folder.glob("*/*config.json"))}
        return family, family.blueprint(files)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder, error) from error


def check_device(name: str) -> None:
    """Raises UserError for a device that torch does not know or this machine does not have."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        reason = first_line(error).rstrip(".")
        raise UserError(f"device {name!r} cannot be used here ({reason}); give device=cpu or another one") from error


def damaged(folder: str | Path, error: Exception) -> UserError:
    """The sentence for a model folder that cannot be read."""
    for file in sorted(Path(folder).rglob("*")):
        if file.is_file() and (other := other_kind(file)):
            return UserError(f"model file {file} {other}")
    reason = " ".join(str(error).split())[:160]
    return UserError(f"model folder {folder} is damaged or incomplete ({reason}); write or copy it again")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from the libraries that read and write weights: they take a blink here."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    before = [(logger, logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, verbosity, bars in before:
            logger.set_verbosity(verbosity)
            if bars:
                logger.enable_progress_bar()
