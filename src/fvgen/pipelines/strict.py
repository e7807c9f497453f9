"""The door for model folders: judged before diffusers or transformers see them, loaded so that nothing is made up.

What a folder may say is a table: the classes are those that a pipeline's own `__init__` names, settings have the type
of their default and the ranges below. Whatever those libraries would do about a name that is not in it (import it, or
fetch it and run it), here it is refused. Weights are loaded strictly: every name, every shape, every value a number.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from torch import nn

from fvgen.errors import UserError, did_you_mean, short
from fvgen.system.doors import NUMBERS, Unreadable, not_finite, open_tensors, other_kind, read_object, regular

INDEX = "model_index.json"
DAMAGE = (OSError, SafetensorError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, AssertionError)
IDS = ("I64", "I32")  # tables of positions, which some versions of transformers store
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".onnx")
CODE = {
    "auto_map": "names code that comes with the weights",
    "quantization_config": "asks for code that unpacks quantised weights",
    "custom_pipelines": "names code that comes with the weights",
}
"""Keys that make the libraries fetch or run what is not in them. Of `*_implementation` a kernel on the Hub does."""
WIDTH, COUNT = (1, 1 << 17), (1, 512)
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("in_channels", "out_channels", "model_channels", "channels", "latent_channels"), WIDTH),
    **dict.fromkeys(("block_out_channels", "context_dim", "dim", "embedding_dim", "output_dim", "hidden_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "projection_dim", "text_embed_dim", "time_embed_dim"), WIDTH),
    **dict.fromkeys(("num_head_channels", "attention_head_dim", "dim_head"), WIDTH),
    **dict.fromkeys(("num_res_blocks", "layers_per_block", "num_layers", "num_hidden_layers", "depth"), COUNT),
    **dict.fromkeys(("num_attention_heads", "init_attn_heads", "heads", "channel_mult", "ff_mult"), COUNT),
    **dict.fromkeys(("norm_num_groups", "attention_resolutions"), (1, 4096)),
    **dict.fromkeys(("patch_size", "image_size", "sample_size", "sample_width", "sample_height"), (1, 1 << 16)),
    **dict.fromkeys(("temporal_length", "video_length", "num_queries", "sample_frames", "tokens"), (1, 1 << 14)),
    **dict.fromkeys(("text_tokens", "max_text_seq_length", "max_position_embeddings"), (1, 1 << 14)),
    "vocab_size": (1, 1 << 20),
    "default_fps": (1, 1000),
    "dropout": (0, 0.99),
    "steps": (1, 1000),
    **dict.fromkeys(("t", "t_max", "arms"), (0, 999)),
    "widths": WIDTH,
    "guidance": (0, 1000),
    "guidance_rescale": (0, 1),
    "camera_guidance": (0, 1000),
    "base_scale": (1e-3, 1),
    "scaling_factor": (1e-4, 1e4),
    "layer_norm_eps": (1e-12, 1),
    "norm_eps": (1e-12, 1),
    **dict.fromkeys(("control_blocks", "space_factor"), COUNT),
    **dict.fromkeys(("camera_lora_rank", "branch_width"), (0, WIDTH[1])),
    "encoder_width": WIDTH,
    "control_t_min": (0, 999),
    **dict.fromkeys(("time_squeeze", "space_squeeze", "pitch", "patch"), (1, 64)),
    **dict.fromkeys(("near", "far", "typical"), (1e-9, 1e9)),
    **dict.fromkeys(("layers", "head_dim"), COUNT),
    "num_train_timesteps": (1, 1 << 16),
    "beta_start": (1e-8, 1),
    "beta_end": (1e-8, 1),
    "snr_shift_scale": (1e-3, 1e3),
}
CHOICES = {
    "prediction": ("v", "eps"),
    "spacing": ("trailing", "uniform"),
    "image_resize": ("viewcrafter", "antialias"),
    "branch": ("lora", "control", "dual"),
}
LARGEST = 1 << 31  # of any other number
MOST = 256  # entries of a list of settings


# --- Settings ---


def judge_settings(given: Mapping[str, Any], defaults: Mapping[str, Any], where: object, optional: Any = ()) -> None:
    """Raises UserError for a setting of another type than its default, beyond its range, or no number.

    ``optional``: names that may be null although their default is not. Names without a default, and names that start
    with an underscore (notes of the libraries), are compared with the ranges alone.
    """
    for name, value in given.items():
        if (problem := _problem(name, value, defaults, optional)) is not None:
            raise UserError(f"{where}: {short(name).strip(chr(39))} is {short(value)}, {problem}; correct it")


def _problem(name: str, value: Any, defaults: Mapping[str, Any], optional: Any) -> str | None:
    default = defaults.get(name)
    if name.startswith("_"):
        return None
    if value is None:
        return "not a value" if name in defaults and default is not None and name not in optional else None
    if isinstance(default, Mapping) or isinstance(value, Mapping):
        return None if isinstance(value, Mapping) and (default is None or isinstance(default, Mapping)) else "no object"
    if isinstance(value, list | tuple):
        if isinstance(default, str | bool):
            return "a list"
        if len(value) > MOST:
            return f"a list of more than {MOST}"
        first = next(iter(default), None) if isinstance(default, list | tuple) else default
        found = (_problem(name, entry, {name: first}, optional) for entry in value)
        return next((problem for problem in found if problem), None if value or name not in RANGES else "empty")
    default = next(iter(default), None) if isinstance(default, list | tuple) else default
    return _scalar_problem(name, value, default)


def _scalar_problem(name: str, value: Any, default: Any) -> str | None:
    if name in CHOICES:
        return None if value in CHOICES[name] else f"not one of {', '.join(CHOICES[name])}"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "not true or false"
    if isinstance(default, str):
        return None if isinstance(value, str) else "no text"
    if isinstance(value, bool | str):
        return "no number" if isinstance(default, int | float) or name in RANGES else None
    if not isinstance(value, int | float) or not abs(value) < math.inf:  # NaN; `isfinite` fails on 400 digits
        return "no finite number"
    low, high = RANGES.get(name, (-LARGEST, LARGEST))
    if not low <= value <= high:
        return f"not within {low:g} and {high:g}"
    return "no whole number" if isinstance(default, int) and not float(value).is_integer() else None


def arguments_of(kind: type) -> tuple[dict[str, Any], set[str]]:
    """Defaults of a class's own arguments (those without one have None), and the names of those that may be null."""
    if config := getattr(kind, "config_class", None):
        return config().to_dict(), set()
    hints = get_type_hints(kind.__init__)
    found = [(name, p) for name, p in signature(kind.__init__).parameters.items() if name != "self"]
    defaults = {name: None if p.default is Parameter.empty else p.default for name, p in found}
    return defaults, {name for name in defaults if type(None) in get_args(hints.get(name))}


def judge_arguments(kind: type, given: Mapping[str, Any], where: object) -> None:
    """Compare settings with the arguments of the class that they are for. Raises UserError for the first wrong one, of
    our own classes also for one that they do not have."""
    defaults, optional = arguments_of(kind)
    if kind.__module__.startswith("fvgen."):
        for name in given:
            if name not in defaults and not name.startswith("_"):
                raise UserError(f"{where}: unknown setting {short(name)}{did_you_mean(name, defaults)}")
    judge_settings(given, defaults, where, optional)


# --- Folders ---


def judge_folder(folder: Path, kind: type) -> dict[str, type]:
    """Judge all that a model folder says, before anybody acts on it; returns the classes of its components by name.

    ``kind``: the pipeline class that is to be made of it. Raises UserError for the first thing that is not as it must
    be: a class that `kind` has no use for, code, pickled weights, a setting out of range, no regular file.
    """
    index = read_object(folder / INDEX, "write or copy the model again")
    judge_json(index, folder / INDEX)
    known = component_classes(kind)
    defaults, optional = arguments_of(kind)
    parts, settings = {}, {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if name in known:
            if (cls := _class_of(name, value, known[name], folder / INDEX)) is not None:
                parts[name] = cls
        elif name in defaults:
            settings[name] = value
        else:
            raise UserError(f"{folder / INDEX}: {kind.__name__} has no {short(name)}{did_you_mean(name, defaults)}")
    judge_settings(settings, defaults, folder / INDEX, optional)
    for name, cls in parts.items():
        judge_component(folder / name, cls)
    return parts


def component_classes(kind: type) -> dict[str, dict[str, type]]:
    """Argument of a pipeline -> the classes that it takes, by their names."""
    found: dict[str, dict[str, type]] = {}
    for name, hint in get_type_hints(kind.__init__).items():
        choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        classes = [cls for cls in choices if isinstance(cls, type) and hasattr(cls, "from_pretrained")]
        if classes:
            found[name] = {cls.__name__: cls for cls in classes}
    return found


def _class_of(name: str, value: Any, known: Mapping[str, type], where: Path) -> type | None:
    if value == [None, None]:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(word, str) for word in value):
        raise UserError(f"{where}: {name} is {short(value)}, not a library and a class; write or copy the model again")
    library, class_name = value
    cls = known.get(class_name) or known.get(class_name.removesuffix("Fast"))
    if cls is None or library not in (cls.__module__, cls.__module__.split(".")[0]):
        allowed = " or ".join(known)
        raise UserError(
            f"{where}: {name} is of class {short('.'.join(value))}, which is not among those that may be loaded "
            f"({allowed}); give a model folder that fvgen wrote"
        )
    return cls


def judge_component(place: Path, cls: type) -> None:
    """The same for the folder of one network (or tokenizer, or scheduler) of class ``cls``."""
    try:
        _judge_component(place, cls)
    except (Unreadable, OSError) as error:
        raise UserError(
            f"model folder {place.parent} is damaged or incomplete ({str(error).split(';')[0]}); write or copy it again"
        ) from error


def _judge_component(place: Path, cls: type) -> None:
    found = sorted(place.iterdir())
    for file in found:
        if not file.is_dir():
            regular(file)
        if file.suffix == ".json" and not file.name.startswith(("vocab", "tokenizer.")):
            content = read_object(file)
            judge_json(content, file)
            if file.name.endswith(".index.json"):
                _judge_shards(content, file)
    if not issubclass(cls, nn.Module):
        return
    config = place / "config.json"
    settings = read_object(config)
    said = settings.get("_class_name", cls.__name__)
    if said != cls.__name__:
        raise UserError(f"{config} is of class {short(said)}, {INDEX} says {cls.__name__}; write or copy it again")
    judge_arguments(cls, settings, config)
    weights = [file for file in found if file.suffix == ".safetensors"]
    if not weights and (pickled := [file for file in found if file.suffix in PICKLES]):
        raise UserError(
            f"model file {pickled[0]} is no .safetensors, and other weights may hold code, which is never run; save "
            "the model again with safe_serialization=True, or get its .safetensors"
        )
    for file in weights:
        _judge_types(file)


def judge_json(content: Mapping[str, Any], where: Path) -> None:
    """Raises UserError for a key anywhere in a JSON file that makes the libraries run what is not in them."""
    for key, value in _pairs(content):
        if key in CODE and value not in (None, {}, []):
            raise UserError(f"{where}: {key} {CODE[key]}, and code is never loaded; remove it or give another model")
        if key.endswith("_implementation") and isinstance(value, str) and ("/" in value or ":" in value):
            raise UserError(f"{where}: {key} names {short(value)}, code from elsewhere; remove it")


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _judge_shards(content: Mapping[str, Any], where: Path) -> None:
    """The list of a model's shards must name files beside it."""
    names = content.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{where} has no weight_map of file names; copy it again")
    for name in set(names.values()):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{where} names {short(name)}, no .safetensors beside it; copy the model again")


def _judge_types(file: Path) -> None:
    if other := other_kind(file):
        raise UserError(f"model file {file} {other}")
    with open_tensors(file) as tensors:
        kinds = {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
    wrong = next((key for key, kind in kinds.items() if kind not in NUMBERS + IDS), None)
    if wrong is not None:
        raise UserError(f"model file {file}: {short(wrong)} is of type {kinds[wrong]}, no weights; copy it again")


# --- Weights ---


def load_part(place: Path, cls: type, options: Mapping[str, Any]) -> Any:
    """A component of a judged folder, complete and finite. Raises UserError for one that is neither.

    ``options``: what its `from_pretrained` takes beside the folder.
    """
    strict = {"use_safetensors": True, "output_loading_info": True, **options} if issubclass(cls, nn.Module) else {}
    try:
        found = cls.from_pretrained(place, local_files_only=True, **strict)
    except Exception as error:  # the libraries' validators have classes of their own
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"model folder {place.parent} is damaged or incomplete ({place.name}: {reason}); write or copy it again"
        ) from error
    if not strict:
        return found
    (part, info), told = found, []
    for key, words in (("missing_keys", "missing"), ("unexpected_keys", "unexpected"), ("mismatched_keys", "other")):
        names = sorted(str(name) for name in info.get(key) or ())
        if names:
            told.append(f"{len(names)} {words}, such as {short(names[0])}")
    if told:
        raise UserError(
            f"model folder {place.parent} is damaged or incomplete (weights of {place.name}: {'; '.join(told)}); write "
            "or copy it again"
        )
    check_values(part, place)
    return part


def check_values(part: nn.Module, place: object) -> None:
    """Raises UserError for a network with weights that are missing, NaN or infinite."""
    named = [*part.named_parameters(), *part.named_buffers()]
    empty = next((name for name, tensor in named if tensor.is_meta), None)
    if empty is not None:
        raise UserError(f"{place} has no values for {short(empty)}; write or copy the model again")
    if (name := not_finite(named)) is not None:
        raise UserError(
            f"{place}: {short(name)} holds NaN or infinite weights; give an intact model, or train with lower rates"
        )


def load_alone(folder: str | Path, cls: type, **options: Any) -> Any:
    """A network that is a folder of its own (a head, a decoder), judged and strict as a pipeline's components are.

    Raises UserError, or one of `DAMAGE` for what the libraries find.
    """
    judge_component(Path(folder), cls)
    return load_part(Path(folder), cls, options)


def dtype_options(cls: type, dtype: Any, name: str) -> dict[str, Any]:
    """How a component's type is asked for, as `DiffusionPipeline.from_pretrained` does it."""
    if isinstance(dtype, Mapping):
        dtype = dtype.get(name, dtype.get("default", torch.float32))
    return {"dtype" if hasattr(cls, "config_class") and cls.config_class else "torch_dtype": dtype}
