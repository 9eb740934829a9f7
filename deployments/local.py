"""What the Makefile does on this machine: the environment, the services, the main job. Standard library alone.

python3 -m deployments.local install [--dev] [--torch] | up [--docker] | down | run [CONFIG]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from deployments.environment import Environment, SetupError
from deployments.services import DOCKER_HERE, DOCKER_PUSHED, Services

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "deployments/configs/digits.yaml"


def install(*, dev: bool, torch: bool) -> None:
    """Make the environment ready."""
    environment = Environment(ROOT)
    with Services(ROOT, environment.python).lock():
        environment.ensure(dev=dev, torch=torch)


def up(*, docker: bool = False) -> None:
    """Start the server, the work pool and the worker, and deploy; with `docker`, what runs in a container besides."""
    environment = Environment(ROOT)
    services = Services(ROOT, environment.python)
    with services.lock():
        if docker:
            ensure_docker_answers()
        environment.ensure()
        url = services.deploy()
        pool = DOCKER_PUSHED if os.environ.get("NEXA_REGISTRY") else DOCKER_HERE
        if docker:
            services.deploy(pool)
    in_a_container = f"""
The same sweep, its flow in a container:
    .venv/bin/prefect deployment run {pool.deployments[0]} --watch"""
    print(f"""
Prefect's UI: {url.removesuffix("/api")}
Start the example sweep there (Deployments, sweep/default, Run), or here:
    .venv/bin/prefect deployment run sweep/default --watch
The example training, under PyTorch's DDP{"" if environment.has_torch else ", once `make torch` has installed it"}:
    .venv/bin/prefect deployment run training/default --watch
On a Slurm cluster, saved there under a name (Blocks, Slurm Cluster):
    .venv/bin/prefect deployment run sweep/slurm -p cluster=NAME --watch{in_a_container if docker else ""}
Stop everything again: make down""")
    own = os.environ.get("PREFECT_API_URL")
    if own is not None and own != url:
        print(f"PREFECT_API_URL is set to {own} here, and prefect would ask that server: unset PREFECT_API_URL")


def ensure_docker_answers() -> None:
    """Ask Docker's engine how it is.

    Raises:
        SetupError: there is none, or it does not answer; the message says what to do.
    """
    advice = "start it, or set DOCKER_HOST to one that runs; `make up` does without"
    try:
        done = subprocess.run(["docker", "version"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SetupError(f"there is no docker on this machine: install it, {advice}") from None
    if done.returncode:
        raise SetupError(f"Docker's engine does not answer: {advice}\n{done.stderr.strip()}")


def down() -> None:
    """Stop the workers and the server."""
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
    upping = verbs.add_parser("up", help="start the server and a worker, and deploy")
    upping.add_argument("--docker", action="store_true", help="deploy what runs in a container, too")
    verbs.add_parser("down", help="stop them")
    verbs.add_parser("run", help="run a sweep through the flow").add_argument("config", nargs="?", default=CONFIG)
    arguments = parser.parse_args()
    try:
        match arguments.verb:
            case "install":
                install(dev=arguments.dev, torch=arguments.torch)
            case "up":
                up(docker=arguments.docker)
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
