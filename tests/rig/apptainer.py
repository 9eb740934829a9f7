"""A real Apptainer, out of a Debian newer than the machine's, as a command that the machine's processes can call."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from deployments.environment import SetupError
from tests.rig.accounts import Account, Accounts
from tests.rig.daemons import put
from tests.rig.images import Image, debootstrap, kept
from tests.rig.slurm_parts import clean_environment

_SUITE = "sid"
_PACKAGES = ("apptainer", "ca-certificates", "squashfuse", "fuse-overlayfs")  # the last two are for plain users
# The machine may lack a capability: apptainer as root wants them all, unless it is told.
_SETTING = ("root default capabilities = full", "root default capabilities = no")
_SHOWN = ("etc/hosts", "etc/resolv.conf", "etc/passwd", "etc/group")  # places for the machine's own


def root() -> Path:
    """Return the Debian that apptainer is in."""
    return kept(f"apptainer-{_SUITE}", f"{_PACKAGES} {_SETTING} {_SHOWN}", _make_root)


def _make_root(target: Path) -> None:
    debootstrap(_SUITE, _PACKAGES, target)
    conf = target / "etc/apptainer/apptainer.conf"
    conf.write_text(conf.read_text().replace(*_SETTING))
    for name in _SHOWN:
        (target / name).touch()
    for name in ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/lib/apt/lists"):
        shutil.rmtree(target / name, ignore_errors=True)


class ApptainerRig:
    """The command `apptainer` in a folder of its own, `bin`, which wants to be on PATH.

    It sees the machine's files where they are, but for /usr, /etc and /var (of which /var/tmp is the machine's).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.bin = self.folder / "bin"
        self.program = self.bin / "apptainer"
        self.cache = self.folder / "cache"

    def write(self) -> None:
        """Write the command.

        Raises:
            SetupError: the Debian that it needs cannot be installed.
        """
        self.bin.mkdir(parents=True, exist_ok=True)
        self.cache.mkdir(exist_ok=True)
        self.cache.chmod(0o1777)
        self.folder.chmod(0o755)
        (self.folder / "root").unlink(missing_ok=True)
        (self.folder / "root").symlink_to(root())
        if not (fuse := self.folder / "fuse").exists():  # the machine's, as every user may open it on most machines
            os.mknod(fuse, stat.S_IFCHR, os.makedev(10, 229))
            fuse.chmod(0o666)
        text = Path(__file__).with_name("apptainer_enter.py").read_text()
        python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable  # one for every user
        put(self.program, f"#!{python} -IS\n{text}", mode=0o755)

    def sif(self, image: Image) -> Path:
        """Return an image as a SIF file, which is made once a machine and belongs to nobody's test.

        Raises:
            SetupError: apptainer cannot make it; the message holds its words.
        """

        def build(target: Path) -> None:
            done = self.run(["build", str(target), f"docker-archive://{image.archive}"])
            if done.returncode:
                raise SetupError(f"apptainer build failed (exit code {done.returncode}):\n{done.stdout}{done.stderr}")

        return kept(f"{image.archive.stem}.sif", image.recipe, build)

    def environment(self) -> dict[str, str]:
        """Return an environment in which `apptainer` is this one, and keeps here what it fetches."""
        found = clean_environment()
        return found | {"PATH": f"{self.bin}{os.pathsep}{found['PATH']}", "APPTAINER_CACHEDIR": str(self.cache)}

    def run(
        self, argv: Sequence[str], *, more: Mapping[str, str] | None = None, cwd: Path | None = None,
        user: Account | None = None, accounts: Accounts | None = None, timeout: float = 300.0,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run an apptainer command such as `["--version"]`, with `more` in its environment.

        Raises:
            subprocess.TimeoutExpired: it took longer than `timeout` seconds.
        """
        words = ["apptainer", *argv]
        environment = self.environment() | dict(more or {})
        if user and accounts:
            words = accounts.enter(["setpriv", f"--reuid={user.uid}", f"--regid={user.uid}", "--init-groups", *words])
            environment |= {"HOME": str(accounts.home(user)), "USER": user.name, "LOGNAME": user.name}
        return subprocess.run(
            words, env=environment, cwd=cwd, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
