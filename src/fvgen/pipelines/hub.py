"""The Hugging Face Hub: what is fetched from there, only where it is allowed, and what goes there.

Nothing is downloaded unasked: what is not in the Hub's cache needs FVGEN_DOWNLOAD=1, and is announced on stderr.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderTiny
from huggingface_hub import create_repo, hf_hub_download, snapshot_download, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from fvgen.errors import UserError, first_line
from fvgen.pipelines.card import write_card
from fvgen.pipelines.presets import SHIPPED, model_folder
from fvgen.pipelines.strict import (
    DAMAGE,
    INDEX,
    component_classes,
    dtype_options,
    judge_folder,
    load_alone,
    load_part,
)
from fvgen.system.files import new_folder

if TYPE_CHECKING:
    from typing_extensions import Self

DECODERS = {"taesd": "madebyollin/taesd"}
HUB = "https://huggingface.co/"
DOWNLOAD = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "variant")
BY_DIFFUSERS = {"device_map", "quantization_config"}
"""Arguments of `from_pretrained` with which diffusers puts the weights in place as it reads them."""
FAILURES = (OSError, ValueError, HfHubHTTPError, HFValidationError)


class FolderOnHub:
    """Pipelines write a model card beside their weights, and can be pushed with it; those that ship with fvgen are
    loaded by name.

    A mixin to stand before `DiffusionPipeline`, whose own `push_to_hub` would write an empty card over ours, and whose
    `from_pretrained` would look for a shipped model on the Hub.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **options: Any) -> Self:
        """diffusers' own, of folders that `fvgen.pipelines.strict` has judged and with weights that are whole; "tiny"
        is the model that ships with fvgen, in float32 unless a type is given, wherever there is no folder of that name.

        Raises UserError for a folder that names other classes than this pipeline's, holds code, or lacks weights.
        """
        name, shipped = pretrained_model_name_or_path, SHIPPED / pretrained_model_name_or_path
        if not Path(name).exists() and (shipped / INDEX).is_file():
            typed = {} if options.keys() & {"torch_dtype", "dtype"} else {"torch_dtype": torch.float32}
            name, options = shipped, {"local_files_only": True, **typed, **options}
        known = component_classes(cls)
        if not os.path.isdir(name):
            asked = {key: value for key, value in options.items() if key in DOWNLOAD or key in known}
            name = cls.download(str(name), use_safetensors=True, **asked)
        folder = Path(name)
        parts = judge_folder(folder, cls)
        if options.keys() & BY_DIFFUSERS:
            return super().from_pretrained(name, **options)
        dtype = options.get("dtype", options.get("torch_dtype"))
        for part, kind in parts.items():
            if part not in options:
                variant = {"variant": options["variant"]} if _has_variant(folder / part, options) else {}
                options[part] = load_part(folder / part, kind, variant | dtype_options(kind, dtype, part))
        return super().from_pretrained(name, **options)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """diffusers' own, and a README.md: a model card, unless the folder has one."""
        push = kwargs.pop("push_to_hub", False)
        repo_id = kwargs.pop("repo_id", Path(save_directory).name)
        hub_options = {key: kwargs.pop(key) for key in ("commit_message", "private", "token") if key in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)
        write_card(self, Path(save_directory))
        if push:
            self.push_to_hub(repo_id, **hub_options)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **save_options,
    ) -> str:
        """Upload the whole model with its card to the Hub; returns the address of the commit.

        Args:
            repo_id: "name" or "organisation/name"; created if it does not exist.
            save_options: such as `variant`, for `save_pretrained`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **save_options)
            repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            message = commit_message or f"Upload {type(self).__name__}"
            commit = upload_folder(
                repo_id=repo_id, folder_path=folder, token=token, commit_message=message, create_pr=create_pr
            )
        return str(commit)


def _has_variant(place: Path, options: dict[str, Any]) -> bool:
    """Whether a component has files of the ``variant`` that is asked for, as diffusers decides it."""
    return bool(options.get("variant")) and any(place.glob(f"*.{options['variant']}*.safetensors"))


def fetch_decoder(name: str | Path) -> AutoencoderTiny:
    """An `AutoencoderTiny` from a folder, or one of `DECODERS` by name.

    Raises UserError where there is none, or where it would have to be downloaded and that is not allowed.
    """
    folder = Path(name)
    if not folder.is_dir():
        if str(name) not in DECODERS:
            known = ", ".join(DECODERS)
            raise UserError(
                f"fast decoder {name} is no folder; give the folder of an AutoencoderTiny, or one of {known}"
            )
        folder = fetch_folder(DECODERS[str(name)], ("*.json", "*.safetensors"))
    try:
        return load_alone(folder, AutoencoderTiny)
    except DAMAGE as error:
        raise UserError(f"{folder} holds no usable AutoencoderTiny ({first_line(error)}); give another one") from error


def fetch_folder(repo_id: str, patterns: tuple[str, ...]) -> Path:
    """The files of a repository on the Hub that match, from the cache or, where it is allowed, from the network."""
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(patterns), local_files_only=True))
    except LocalEntryNotFoundError:
        announce(HUB + repo_id)
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(patterns)))
    except FAILURES as error:
        raise UserError(f"the download of {repo_id} failed ({first_line(error)}); check name and network") from error


def find_model(name: str | Path) -> Path:
    """A model's folder: a preset, a path, or ORGANISATION/NAME on the Hub (its cache, or the network where allowed).

    A name whose first part is a folder here is a path that leads nowhere, and is told so.
    """
    named = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name))
    if named and not Path(name).exists() and not Path(str(name).split("/")[0]).exists():
        return model_folder(fetch_folder(str(name), ("*.json", "*.safetensors", "*.txt")))
    return model_folder(name)


def fetch_file(name: str) -> Path:
    """A local file as it is; an address or "organisation/name/path/in/repository" from the Hub's cache or the network.

    Raises UserError where there is no such file, or where a download is not allowed or fails.
    """
    if Path(name).exists():
        return Path(name)
    name = re.sub(r"^hf:(//)?", "", name)
    if name.startswith(HUB):
        found = re.fullmatch(r"([^/]+/[^/]+)/(?:resolve|blob)/([^/]+)/([^?]+)(?:\?.*)?", name.removeprefix(HUB))
        if not found:
            raise UserError(f"{name} is no address of a file on the Hub; copy that of its download link")
        return _fetch_from_hub(found[1], found[3], found[2])
    if re.match(r"https?://", name):
        return _fetch_address(name)
    parts = name.split("/")
    if name.startswith(("/", ".", "~")) or len(parts) < 3 or not Path(name).suffix:
        raise UserError(f"there is no file {name}; give a path, an address, or ORGANISATION/REPOSITORY/FILE on the Hub")
    return _fetch_from_hub("/".join(parts[:2]), "/".join(parts[2:]), None)


def announce(address: str) -> None:
    """Say what is about to be downloaded; raises UserError unless FVGEN_DOWNLOAD=1 allows it."""
    if os.environ.get("FVGEN_DOWNLOAD") != "1":
        raise UserError(f"{address} is not on this machine; set FVGEN_DOWNLOAD=1 to allow its download, or give a path")
    print(f"fvgen: downloading {address}", file=sys.stderr)


def _fetch_from_hub(repo_id: str, path: str, revision: str | None) -> Path:
    try:
        try:
            return Path(hf_hub_download(repo_id, path, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            announce(f"{HUB}{repo_id}/{path}")
        return Path(hf_hub_download(repo_id, path, revision=revision))
    except UserError:
        raise
    except FAILURES as error:
        raise UserError(f"the download of {repo_id}/{path} failed ({first_line(error)}); check the name") from error


def _fetch_address(address: str) -> Path:
    """Into torch hub's cache, under a name that no other address has."""
    name = address.split("?")[0].rsplit("/", 1)[-1]
    target = Path(torch.hub.get_dir()) / "checkpoints" / f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-{name}"
    if not target.is_file():
        announce(address)
        try:
            new_folder(target.parent)
            torch.hub.download_url_to_file(address, str(target))
        except (OSError, RuntimeError) as error:
            raise UserError(f"the download of {address} failed ({first_line(error)}); check the address") from error
    return target
