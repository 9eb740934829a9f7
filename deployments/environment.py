"""What the project needs on a machine: Debian's packages and the Python environment in .venv."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

# A package, and the commands any of which shows that it is there.
NEEDED: dict[str, tuple[str, ...]] = {
    "git": ("git",),
    "rsync": ("rsync",),
    "shellcheck": ("shellcheck",),
    "procps": ("pgrep",),
}
NEEDED_BY_TESTS: dict[str, tuple[str, ...]] = {"chromium": ("chromium", "chromium-browser", "google-chrome")}


class SetupError(Exception):
    """The machine lacks something; the message says what to do."""

    exit_code = 2


class Environment:
    """The project's .venv, and the packages beside it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / ".venv"
        self.python = self.folder / "bin" / "python"
        self._stamp = self.folder / ".nexa-installed.json"

    @property
    def has_torch(self) -> bool:
        """Whether a training under torchrun can start in it."""
        return (self.folder / "bin" / "torchrun").exists()

    def ensure(self, *, dev: bool = False, torch: bool = False) -> None:
        """Make the environment ready; costs next to nothing where it is.

        `dev` brings what the tests need, PyTorch among it; `torch` brings PyTorch.

        Raises:
            SetupError: packages are missing and cannot be installed, or pip failed.
        """
        extras = ["examples", *(["dev"] if dev else []), *(["torch"] if torch else [])]
        wanted = self._digest()
        installed = self._read_stamp()
        ready = installed.get("digest") == wanted and installed.get("root") == str(self.root) and self._works()
        done = set(installed.get("extras", "").split(",")) if ready else set()
        self._ensure_packages(dev=dev, venv=not ready)
        if done.issuperset(extras):
            return
        if not self._works() or installed.get("root", str(self.root)) != str(self.root):
            print(f"making {self.folder.name} with Python {sys.version.split()[0]}", flush=True)
            _run([_base_python(), "-m", "venv", "--clear", str(self.folder)], "the environment could not be made")
        what = "PyTorch and other Python packages (minutes" if dev or torch else "the Python packages (under a minute"
        print(f"installing {what}, once)", flush=True)
        target = f".[{','.join(sorted(done.union(extras) - {''}))}]"
        pip = [str(self.python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        _run([*pip, "--constraint", "constraints.txt", "--editable", target], "pip failed", cwd=self.root)
        stamp = {"digest": wanted, "root": str(self.root), "extras": ",".join(sorted(done.union(extras) - {""}))}
        draft = self._stamp.with_suffix(".new")
        draft.write_text(json.dumps(stamp))
        draft.replace(self._stamp)

    def _works(self) -> bool:
        return self.python.exists()  # a link to an interpreter that is gone does not exist

    def _read_stamp(self) -> dict[str, str]:
        try:
            found = json.loads(self._stamp.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _digest(self) -> str:
        """Return what the installed packages depend on: other tables of pyproject.toml do not count."""
        project = tomllib.loads((self.root / "pyproject.toml").read_text())
        parts = [project["build-system"], project["project"], (self.root / "constraints.txt").read_text()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _ensure_packages(self, *, dev: bool, venv: bool) -> None:
        missing = list(missing_packages(NEEDED | (NEEDED_BY_TESTS if dev else {})))
        if venv and importlib.util.find_spec("ensurepip") is None:
            missing.append(f"python{sys.version_info.major}.{sys.version_info.minor}-venv")
        if missing:
            install_packages(missing)


def missing_packages(needed: dict[str, tuple[str, ...]]) -> Iterable[str]:
    """Yield the Debian packages none of whose commands is found."""
    return (package for package, commands in needed.items() if not any(map(shutil.which, commands)))


def install_packages(packages: list[str]) -> None:
    """Install Debian packages as root.

    Raises:
        SetupError: this is not root, or not a Debian, or apt-get failed.
    """
    names = shlex.join(packages)
    if shutil.which("apt-get") is None:
        raise SetupError(f"this machine lacks {names}: install them with its package manager, then run this again")
    if os.geteuid() != 0:
        raise SetupError(
            f"this machine lacks {names}. Install them, then run this again:\n"
            f"    sudo apt-get update && sudo apt-get install --yes --no-install-recommends {names}"
        )
    print(f"installing Debian's {names}", flush=True)
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120", "-o", "Dpkg::Use-Pty=0"]
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # A list that cannot be refreshed need not stop the installation: the one on the machine may do.
    subprocess.run([*apt, "update"], env=env, check=False, stdout=subprocess.DEVNULL)
    _run([*apt, "install", "--yes", "--no-install-recommends", *packages], "apt-get failed", env=env, quiet=True)


def _base_python() -> str:
    """Return the interpreter that .venv is made from, also when .venv's own runs this."""
    base = getattr(sys, "_base_executable", None)
    return base if isinstance(base, str) and base else sys.executable


def _run(
    argv: list[str], failure: str, *, cwd: Path | None = None, env: dict[str, str] | None = None, quiet: bool = False
) -> None:
    output = subprocess.DEVNULL if quiet else None
    if (code := subprocess.run(argv, cwd=cwd, env=env, stdout=output, check=False).returncode) != 0:
        raise SetupError(f"{failure} (exit code {code}): {shlex.join(argv)}")
