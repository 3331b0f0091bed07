"""The protocol record: what has to be the same for a number to come out the same."""

import importlib.metadata
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from utils.paths import ROOT
from utils.processes import Processes

LIBRARIES = (
    "torch",
    "torchvision",
    "torchmetrics",
    "torch-fidelity",
    "timm",
    "numpy",
    "scipy",
    "scikit-learn",
    "Pillow",
)


def protocol(processes: Processes, **facts: Any) -> dict[str, Any]:
    """The record that stands beside every number: `facts`, then how, where and by what code it was computed."""
    return {
        **facts,
        "rounding": "images are rounded to 8 bits before they are compared",
        "precision": "float32, autocast and TF32 off; sums in float64",
        "device": str(processes.device.type),
        "processes": processes.world_size,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "commit": commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def exact_arithmetic() -> None:
    """Turn TF32 off for this process: features and images come out in full float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def commit() -> str | None:
    """The commit of this repository, with "+changes" where files differ from it; None outside of a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    if head is None:
        return None
    return f"{head}+changes" if git("status", "--porcelain", "--untracked-files=no") else head
