"""What the Makefile does on this machine: the environment, the services, the main job. Standard library alone.

python3 -m deployments.local install [--dev] [--torch] | up | down | run [CONFIG]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from deployments.environment import Environment, SetupError
from deployments.services import Services

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "deployments/configs/digits.yaml"


def install(*, dev: bool, torch: bool) -> None:
    """Make the environment ready."""
    environment = Environment(ROOT)
    with Services(ROOT, environment.python).lock():
        environment.ensure(dev=dev, torch=torch)


def up() -> None:
    """Start the server, the work pool and the worker, and deploy."""
    environment = Environment(ROOT)
    services = Services(ROOT, environment.python)
    with services.lock():
        environment.ensure()
        url = services.deploy()
    print(f"""
Prefect's UI: {url.removesuffix("/api")}
Start the example sweep there (Deployments, sweep/default, Run), or here:
    .venv/bin/prefect deployment run sweep/default --watch
The example training, under PyTorch's DDP{"" if environment.has_torch else ", once `make torch` has installed it"}:
    .venv/bin/prefect deployment run training/default --watch
On a Slurm cluster, saved there under a name (Blocks, Slurm Cluster):
    .venv/bin/prefect deployment run sweep/slurm -p cluster=NAME --watch
Stop everything again: make down""")
    own = os.environ.get("PREFECT_API_URL")
    if own is not None and own != url:
        print(f"PREFECT_API_URL is set to {own} here, and prefect would ask that server: unset PREFECT_API_URL")


def down() -> None:
    """Stop the worker and the server."""
    services = Services(ROOT, Environment(ROOT).python)
    with services.lock():
        stopped = services.stop()
    print(f"stopped the {' and the '.join(stopped)}" if stopped else "nothing was running")


def run(config: str) -> None:
    """Run a sweep through the Prefect flow; this process becomes it, so that signals reach it directly."""
    environment = Environment(ROOT)
    services = Services(ROOT, environment.python)
    with services.lock():
        environment.ensure()
        url = services.start_server()
    sys.stdout.flush()
    os.chdir(ROOT)
    argv = [str(environment.python), "-m", "deployments.run_example", config]
    os.execve(environment.python, argv, services.environment(url))  # noqa: S606 - no shell is meant


def main() -> int:
    """Run one verb; return the exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m deployments.local", description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    installing = verbs.add_parser("install", help="make .venv ready")
    installing.add_argument("--dev", action="store_true", help="with what the tests need")
    installing.add_argument("--torch", action="store_true", help="with PyTorch, for the example training")
    verbs.add_parser("up", help="start the server and a worker, and deploy")
    verbs.add_parser("down", help="stop them")
    verbs.add_parser("run", help="run a sweep through the flow").add_argument("config", nargs="?", default=CONFIG)
    arguments = parser.parse_args()
    try:
        match arguments.verb:
            case "install":
                install(dev=arguments.dev, torch=arguments.torch)
            case "up":
                up()
            case "down":
                down()
            case "run":
                run(arguments.config)
    except SetupError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
