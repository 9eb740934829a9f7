#!/usr/bin/env python3
"""Print what an image holds and which devices it sees, as one JSON object. Standard library alone."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path

PACKAGES = ("jax", "nexa-infra", "numpy", "pandas", "prefect", "scikit-learn", "scipy", "torch", "transformers")


def versions() -> dict[str, str]:
    """Return the versions of those packages that are installed, without importing them."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def devices(torch_is_there: bool) -> dict[str, object]:
    """Return what there is to compute on: cores, and GPUs by their device files and by PyTorch's own count."""
    names = [path.name for path in Path("/dev").glob("nvidia*")]
    render = [path.name for path in Path("/dev/dri").glob("renderD*")]
    return {
        "cpu": len(os.sched_getaffinity(0)),
        "nvidia": sum(1 for name in names if re.fullmatch(r"nvidia[0-9]+", name)),
        "amd": len(render) if Path("/dev/kfd").exists() else 0,
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "torch": torch_count() if torch_is_there else None,
    }


def torch_count() -> int | str:
    """Return how many GPUs PyTorch sees, or why it cannot say."""
    try:
        import torch

        return torch.cuda.device_count()
    except Exception as error:  # noqa: BLE001 - an image whose PyTorch is broken is to say so, not to die of it
        return f"{type(error).__name__}: {error}"


def main() -> None:
    """Print it."""
    packages = versions()
    told = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "devices": devices("torch" in packages),
        "uid": os.getuid(),
        "gid": os.getgid(),
    }
    print(json.dumps(told, sort_keys=True))


if __name__ == "__main__":
    main()
