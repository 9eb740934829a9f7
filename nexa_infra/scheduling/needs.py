"""What a run needs where it executes, as shell that says what is missing: asked before anything is copied."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping

from nexa_infra.hosts.shell import join, quote, quote_path
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.script import setup_lines
from nexa_infra.spec.cluster import Cluster

# How long a trial's environment may take to be made when it is tried, seconds.
SETUP_SECONDS = 120.0


def checkpoints_check(run: Run) -> str:
    """Return POSIX shell that says why the run's checkpoints cannot be written; it only looks."""
    folder = run.config.checkpoint.dir
    if folder is None:
        return "true"
    return f"""
nexa_dir={quote_path(folder)}
nexa_above=$nexa_dir
while [ ! -e "$nexa_above" ]; do nexa_above=$(dirname -- "$nexa_above"); done
if [ ! -d "$nexa_above" ]; then
  printf 'checkpoint.dir: %s lies below %s, which is no folder: name another\\n' "$nexa_dir" "$nexa_above"
elif [ ! -w "$nexa_above" ] || [ ! -x "$nexa_above" ]; then
  printf 'checkpoint.dir: %s cannot be written: %s belongs to %s: name another\\n' \\
    "$nexa_dir" "$nexa_above" "$(stat -c '%U, mode %a' -- "$nexa_above")"
fi"""


def torchrun_check(run: Run) -> str:
    """Return POSIX shell that says that the environment that the job names has no torchrun.

    Where modules, conda or lines of shell make it, only a node can tell.
    """
    setup = run.config.job.setup
    folder = setup.venv or (f"{setup.uv.rstrip('/')}/.venv" if setup.uv is not None else None)
    if run.config.launcher.type != "torchrun" or folder is None or setup.lines or run.container is not None:
        return "true"
    key = "venv" if setup.venv else "uv"
    return f"""
nexa_env={quote_path(folder)}
if [ -d "$nexa_env" ] && [ ! -x "$nexa_env/bin/torchrun" ]; then
  printf 'torchrun is not installed in %s (job.setup.{key}), asked on %s: install PyTorch there\\n' \\
    "$nexa_env" "$(hostname)"
fi"""


def container_check(run: Run) -> str:
    """Return POSIX shell that says what the run's container is to see and is not there, and who may read its login."""
    container = run.container
    if container is None:
        return "true"
    checks = [_MOUNT_CHECK.replace("PATH_SEEN", quote_path(mount.source, by=quote)) for mount in container.mounts]
    if run.cluster is not None and run.cluster.allowed_mounts:
        # A cluster's volumes are its own word.
        checks += [_allowed_check(mount.source, run.cluster) for mount in container.settings.mounts]
    if container.auth_file is not None:
        checks.append(_AUTH_CHECK.replace("PATH_SEEN", quote_path(container.auth_file, by=quote)))
    return "".join(checks) or "true"


def _allowed_check(source: str, cluster: Cluster) -> str:
    values = {
        "PATH_SEEN": quote_path(source, by=quote),
        "CLUSTER": quote(cluster.name),
        "FOLDERS": join(cluster.allowed_mounts),
        "TOLD": quote(", ".join(cluster.allowed_mounts)),
    }
    return re.sub("|".join(values), lambda found: values[found[0]], _ALLOWED_CHECK)


_MOUNT_CHECK = r"""
nexa_seen=PATH_SEEN
[ -e "$nexa_seen" ] ||
  printf 'container.mounts: %s is not there, asked on %s: make it, or name another\n' "$nexa_seen" "$(hostname)"
"""
# A link may lead out of what is allowed, and an allowed folder may be one; `-n` keeps a newline at a path's end.
_ALLOWED_CHECK = r"""
nexa_seen=PATH_SEEN
nexa_real=$(readlink -fn -- "$nexa_seen" && printf .)
nexa_real=${nexa_real%.}
nexa_fine=
for nexa_folder in FOLDERS; do
  nexa_folder=$(readlink -fn -- "$nexa_folder" && printf .)
  nexa_folder=${nexa_folder%.}
  [ -z "$nexa_folder" ] || case $nexa_real/ in "${nexa_folder%/}"/*) nexa_fine=1 ;; esac
done
[ ! -e "$nexa_seen" ] || [ -n "$nexa_fine" ] ||
  printf 'container.mounts: %s leads to %s, outside what the cluster %s lets containers mount: %s\n' \
    "$nexa_seen" "$nexa_real" CLUSTER TOLD
"""
_AUTH_CHECK = r"""
nexa_seen=PATH_SEEN
nexa_mode=$(stat -L -c %a -- "$nexa_seen" 2>/dev/null)
case $nexa_mode in
  600 | 400) ;;
  '') printf 'container.auth_file: %s is not there, asked on %s\n' "$nexa_seen" "$(hostname)" ;;
  *) printf 'container.auth_file: %s has mode %s: chmod 600 it\n' "$nexa_seen" "$nexa_mode" ;;
esac
"""
_RUNTIME_CHECK = r"""
if ! command -v RUNTIME >/dev/null; then
  printf 'RUNTIME is not installed on %s: install it, or set container.runtime\n' "$(hostname)"
elif [ RUNTIME = docker ] && ! nexa_said=$(docker version --format '{{.Server.Version}}' 2>&1); then
  printf 'the engine of Docker does not answer on %s: %s\n' "$(hostname)" "$(printf '%s' "$nexa_said" | tail -n 1)"
fi
"""


def runtime_check(run: Run) -> str:
    """Return POSIX shell that says that what runs the run's container does not run here."""
    if run.container is None or run.container.runtime in {"auto", "pyxis"}:
        return "true"
    return _RUNTIME_CHECK.replace("RUNTIME", run.container.runtime)


def lacking_here(run: Run, environment: Mapping[str, str]) -> list[str]:
    """Say what this machine lacks for a run: a place for its checkpoints, torchrun in its trials' environment."""
    found = [_told("sh", checkpoints_check(run), environment)] if run.config.checkpoint.dir else []
    if run.container is not None:
        found += [_told("sh", check(run), environment) for check in (container_check, runtime_check)]
    if run.config.launcher.type != "torchrun" or run.container is not None:
        return [each for each in found if each]
    if told := _told("sh", torchrun_check(run), environment):
        found.append(told)
    else:
        lines = "\n".join(setup_lines(run.config.job.setup))
        script = (
            f"set_up() {{\n{lines or 'true'}\n}}\nset_up >/dev/null 2>&1; command -v torchrun >/dev/null || echo no"
        )
        env = {**environment, **run.config.job.env}
        if _told("bash", script, env):
            where = "in what job.setup makes" if lines else "on the PATH"
            found.append(
                f"torchrun is not installed on this machine ({os.uname().nodename}, asked {where}): install PyTorch "
                "(`make torch` in this project, `pip install torch` elsewhere), or let job.setup name an environment "
                "that has it"
            )
    return [each for each in found if each]


def _told(shell: str, script: str, environment: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(
            [f"/bin/{shell}", "-c", script],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SETUP_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ""  # whatever it waits for, the trial will say
    return done.stdout.strip()
