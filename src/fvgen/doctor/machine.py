"""What fvgen runs on: Python, torch and its devices, cores, memory, disks, and the variables that fvgen reads."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import psutil

from fvgen.clips.builtin import cache_folder
from fvgen.errors import UserError, did_you_mean, first_line
from fvgen.system.doors import read_text

GB = 1e9
LEAST_DISK, LEAST_MEMORY = 2 * GB, 4 * GB  # of a tiny demo's run with its cache, and of what its processes need
VARIABLES = {
    "FVGEN_CACHE": "folder for what can be made again",
    "FVGEN_DEPTH_PRO": "folder of Depth Pro's weights",
    "FVGEN_DOWNLOAD": "1 allows downloads",
    "FVGEN_DUST3R": "checkout of naver/dust3r",
    "FVGEN_DUST3R_WEIGHTS": "its weights",
    "FVGEN_PROGRESS": "0: training tells nothing, 1: also where nobody is at a terminal",
    "FVGEN_WEIGHTS": "folder of the metrics' weights",
}


def python() -> dict[str, str]:
    """Its version, program, and system."""
    return {"version": platform.python_version(), "program": sys.executable, "system": platform.platform()}


def hardware() -> dict[str, Any]:
    """``cores`` that this process may use, ``memory_gb`` of the machine, or of the container where that is less,
    ``memory_free_gb`` of it, and ``omp_num_threads``, the variable's value or None."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    if (limit := _container_limit()) is not None:
        total = min(total, limit)
        free = min(free, total)
    threads = os.environ.get("OMP_NUM_THREADS")
    return {"cores": cores, "memory_gb": _gb(total), "memory_free_gb": _gb(free), "omp_num_threads": threads}


def _container_limit() -> int | None:
    """Bytes that control groups (version 2) allow; None where they say nothing."""
    try:
        text = read_text("/sys/fs/cgroup/memory.max").strip()
    except UserError:
        return None
    return int(text) if text.isascii() and text.isdecimal() else None


def torch_facts() -> dict[str, Any]:
    """``version``, ``cuda`` (what it was built for, None for CPUs alone), ``threads``, and ``devices``, the CPU first,
    GPUs with ``memory_gb``, ``memory_free_gb`` and ``capability``. Raises what a broken torch raises."""
    import torch

    devices: list[dict[str, Any]] = [{"device": "cpu", "name": platform.processor() or platform.machine()}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            devices.append(
                {
                    "device": f"cuda:{index}",
                    "name": found.name,
                    "capability": f"{found.major}.{found.minor}",
                    "memory_gb": _gb(total),
                    "memory_free_gb": _gb(free),
                }
            )
    built = torch.version.cuda or getattr(torch.version, "hip", None)
    return {"version": torch.__version__, "cuda": built, "threads": torch.get_num_threads(), "devices": devices}


def idle_gpu(facts: dict[str, Any]) -> tuple[str, str] | None:
    """What is wrong, and the cure, where there is an NVIDIA driver that torch does not use; else None."""
    if len(facts["devices"]) > 1 or shutil.which("nvidia-smi") is None:
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides the GPU", "unset CUDA_VISIBLE_DEVICES"
    if facts["cuda"] is None:
        return "this torch was built for CPUs alone", "pip install --force-reinstall torch torchvision"
    says = f"torch was built for CUDA {facts['cuda']}, which the driver does not serve"
    return says, "nvidia-smi  # shows the driver's CUDA; update the driver, or install a torch for it"


def disks() -> list[dict[str, Any]]:
    """``what``, ``path``, ``free_gb`` and ``writable`` of the working folder and the caches, here or not yet made."""
    places: list[tuple[str, Path | None]] = [("working folder", _here()), ("fvgen's cache", _cache())]
    places += [("the Hub's cache", _hub_cache()), ("torch hub's cache", _torch_cache())]
    return [_disk(what, path) for what, path in places if path is not None]


def _disk(what: str, path: Path) -> dict[str, Any]:
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        free = _gb(shutil.disk_usage(there).free)
    except OSError:
        free = 0.0
    return {"what": what, "path": str(path), "free_gb": free, "writable": os.access(there, os.W_OK)}


def _here() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # it was deleted
        return None


def _cache() -> Path | None:
    try:
        return cache_folder()
    except UserError:  # no home
        return None


def _hub_cache() -> Path | None:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except Exception:  # judged with the packages
        return None
    return Path(HF_HUB_CACHE)


def _torch_cache() -> Path | None:
    try:
        import torch

        return Path(torch.hub.get_dir())
    except Exception:  # judged with the packages
        return None


def network() -> dict[str, Any]:
    """``downloads``: whether FVGEN_DOWNLOAD allows them; ``hub_offline``: whether the Hub's own switch forbids them;
    ``token``: whether there is one for the Hub (its value is not read)."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    token = any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    return {"downloads": os.environ.get("FVGEN_DOWNLOAD") == "1", "hub_offline": offline, "token": token}


def variables() -> dict[str, str]:
    """Those of `VARIABLES` that are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def misspelt() -> list[tuple[str, str]]:
    """What is wrong, and the cure, for each variable that looks like ours and is not."""
    ours = [name for name in os.environ if name.startswith("FVGEN_") and not name.startswith("FVGEN_TEST_")]
    strange = [name for name in ours if name not in VARIABLES]
    return [(f"nothing reads {name}{did_you_mean(name, VARIABLES)}", f"unset {name}") for name in sorted(strange)]


def reason(error: BaseException) -> str:
    """One clause for whatever a broken part raised."""
    return f"{type(error).__name__}: {first_line(error)}"


def _gb(count: float) -> float:
    return round(count / GB, 1)
