"""A newer Slurm than the machine's, out of a newer Debian, whose programs run on the machine and not in a root.

They find their loader and their libraries beside them, so jobs, nodes and logins see the machine as it is;
which of the two Slurms somebody speaks to is a matter of PATH alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from deployments.environment import SetupError
from tests.rig import packages
from tests.rig.images import CACHE, debootstrap, kept

_SUITE = "trixie"  # Slurm 24.11
_PACKAGES = ("slurm-client", "slurmctld", "slurmd", "slurmdbd")
_LAYOUT = 1  # raised where what `_make` leaves changes
_FOLDER = CACHE / f"slurm-{_SUITE}"
_PLUGINS = "slurm-wlm"
NEEDED: dict[str, tuple[str, ...]] = {"debootstrap": ("debootstrap",), "patchelf": ("patchelf",)}


def install() -> Path:
    """Return the folder of the newer Slurm's commands and daemons, made once a machine.

    Raises:
        SetupError: Debian cannot be reached, or this is not root.
    """
    packages.ensure(NEEDED)
    return kept(_FOLDER.name, f"{_SUITE} {_PACKAGES} {_LAYOUT}", _make) / "bin"


def _make(target: Path) -> None:
    """Keep of a Debian the programs of Slurm, in bin, and the libraries that they need, in lib."""
    root = target / "debian"
    target.mkdir()
    debootstrap(_SUITE, _PACKAGES, root)
    plugins = next(root.glob(f"usr/lib/*/{_PLUGINS}"))
    for name in ("gconv", "perl-base"):
        shutil.rmtree(plugins.parent / name, ignore_errors=True)
    (target / "bin").mkdir()
    for program in (line for name in _PACKAGES for line in _files(root, name) if line.parent.name in {"bin", "sbin"}):
        kept_as = target / "bin" / program.name.removesuffix("-wlm")  # Debian's alternatives have the plain names
        shutil.move(root / program.relative_to("/"), kept_as)
        loader = Path(_patchelf("--print-interpreter", str(kept_as)).strip())
        # RPATH, unlike RUNPATH, holds for the libraries of libraries and of plugins as well.
        paths = f"$ORIGIN/../lib:$ORIGIN/../lib/{_PLUGINS}"
        _patchelf("--set-interpreter", str(_FOLDER / "lib" / loader.name), str(kept_as))
        _patchelf("--force-rpath", "--set-rpath", paths, str(kept_as))
    shutil.move(plugins.parent, target / "lib")
    shutil.rmtree(root)


def _files(root: Path, package: str) -> list[Path]:
    return [Path(line) for line in (root / f"var/lib/dpkg/info/{package}.list").read_text().splitlines()]


def _patchelf(*words: str) -> str:
    done = subprocess.run(["patchelf", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"patchelf {' '.join(words)} failed:\n{done.stderr}")
    return done.stdout


def in_use() -> Path | None:
    """Return the folder of the newer Slurm's commands where they come first on PATH."""
    found = shutil.which("slurmctld", path=packages.path_with_sbin())
    return _FOLDER / "bin" if found == str(_FOLDER / "bin" / "slurmctld") else None


def path(otherwise: str) -> str:
    """Return a PATH, with the newer Slurm's commands first where they are in use."""
    return os.pathsep.join([*([str(programs)] if (programs := in_use()) else []), otherwise])


def settings() -> Mapping[str, str]:
    """Return what slurm.conf and slurmdbd.conf must say, beside all else, of where this Slurm is."""
    return {"PluginDir": str(_FOLDER / "lib" / _PLUGINS)} if in_use() else {}


def slurmd_options() -> list[str]:
    """Return the options by which slurmd finds its own slurmstepd: Debian's would be the machine's."""
    return ["-d", str(programs / "slurmstepd")] if (programs := in_use()) else []
