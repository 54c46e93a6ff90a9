"""The machine: its devices by name, and what a figure made on it must name to mean anything."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from lst.errors import UserError

__all__ = ["describe_machine", "device_stem", "file_stem", "find_device"]

PEERS = (
    "triton", "numpy", "transformers", "torchaudio",
    "flash-attn", "flash-attn-3", "flash-attn-4", "xformers",
)  # fmt: skip


def find_device(name: torch.device | str) -> torch.device:
    """``cpu``, ``cuda``, ``cuda:1`` … as a device that can be computed on.

    Raises:
        UserError: torch knows no such device, or it is not here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"device {name}: expected one that is here, such as cpu ({reason})"
        ) from None
    return device


def describe_machine(device: torch.device | None = None) -> dict[str, Any]:
    """Of a CUDA device, or of the processor where ``device`` is None."""
    about: dict[str, Any] = {
        "device": _processor() if device is None else torch.cuda.get_device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "libraries": {name: version for name in PEERS if (version := _version(name))},
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }
    if device is None:
        return about | {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    properties = torch.cuda.get_device_properties(device)
    return about | {
        "cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
    }


def file_stem(about: dict[str, Any]) -> str:
    """``nvidia-h200-2026-11-21``: the device and the day, for the name of a result file."""
    return f"{device_stem(about)}-{about['date']}"


def device_stem(about: dict[str, Any]) -> str:
    """``nvidia-h200``: the device, for the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", about["device"].lower().replace("(r)", "")).strip("-")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """``unknown`` where there is no git, or no repository: a copy of the files is enough to run."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return "unknown"
    return run.stdout.strip() or "unknown"
