"""What is measured from inside a fresh process, once its imports are done: python -m benchmarks.inside WHAT ..."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

# `import nexa_infra` leaves these for later.
HEAVY = ("prefect", "fabric", "pandas", "pydantic_settings")


def render(axes: int, points: int) -> dict[str, float]:
    """Render the script of a grid for the first time; its template is compiled in this time."""
    import jinja2  # noqa: F401

    from nexa_infra.scheduling.script import render_script
    from nexa_infra.spec.run import SweepConfig

    grid = {f"axis_{axis}": [f"{point}e-3" for point in range(points)] for axis in range(axes)}
    config = SweepConfig.model_validate({"launcher": {"script": "train.py"}, "sweep": {"parameters": grid}})
    begun = time.perf_counter()
    text = render_script(config, run_id="bench", run_dir="/runs/bench").text
    taken = time.perf_counter() - begun
    return {"trials": len(config.sweep), "ms": taken * 1000, "KiB": len(text.encode()) / 1024}


def heavy() -> list[str]:
    """Name the heavy packages that `import nexa_infra` imported."""
    import nexa_infra  # noqa: F401

    return [name for name in HEAVY if name in sys.modules]


def engine(config: str) -> float:
    """Run a sweep by the engine's call; return its seconds."""
    from nexa_infra.operations.launch import launch_slurm_sweep

    begun = time.perf_counter()
    launch_slurm_sweep(config, submit=True)
    return time.perf_counter() - begun


def flow(config: str) -> float:
    """Run a sweep by the Prefect flow, called from Python; return its seconds."""
    from nexa_infra.flows import sweep

    begun = time.perf_counter()
    asyncio.run(sweep(config_file=config, submit=True))
    return time.perf_counter() - begun


def main() -> None:
    """Measure what the arguments say; the answer is the last line."""
    answer: Any
    match sys.argv[1:]:
        case ["render", axes, points]:
            answer = render(int(axes), int(points))
        case ["heavy"]:
            answer = heavy()
        case ["engine", config]:
            answer = engine(config)
        case ["flow", config]:
            answer = flow(config)
        case _:
            raise SystemExit(__doc__)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
