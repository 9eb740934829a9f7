"""The rig's own accounts: /etc/passwd and its like, seen by the rig's daemons alone, in mount namespaces.

The machine's accounts are neither changed nor used: root has another home here, and there are users beside it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.rig.daemons import put

# A process keeps its id through this: unshare and sh replace themselves.
_ENTER = """\
#!/bin/sh
# enter.sh COMMAND...: run a command among the rig's accounts; the mounts end with the last process that sees them.
set -e
for name in passwd shadow group; do mount --bind "{etc}/$name" "/etc/$name"; done
if test -e /etc/pam.d/sshd; then mount --bind "{etc}/pam.sshd" /etc/pam.d/sshd; fi
exec "$@"
"""
# Asks for one word, the one of the file `code`. pam_permit answers for the credentials, of which pam_exec has none.
_PAM = """\
auth requisite pam_exec.so expose_authtok quiet {etc}/check-code
auth required pam_permit.so
account required pam_permit.so
session required pam_permit.so
"""
_CHECK = """\
#!/bin/sh
# pam_exec hands over what was typed, without a newline.
typed=$(tr -d '\\0')
test -n "$typed" && test "$typed" = "$(cat "{etc}/code")"
"""
CODE = "314159"


@dataclass(frozen=True)
class Account:
    """A user of the rig; those with uid 0 are root by other names."""

    name: str
    uid: int
    shell: str = "/bin/bash"
    bashrc: str = ""


ROOT = Account("root", 0)
CSH = Account("coco", 0, "/bin/csh")
NOISY = Account("noel", 0, bashrc='echo "Welcome to the rig"\necho "quota: 83 % used" >&2\n')
ADA = Account("ada", 21001)
BOB = Account("bob", 21002)
ACCOUNTS = (ROOT, CSH, NOISY, ADA, BOB)


@dataclass(frozen=True)
class Accounts:
    """The files that say who there is, under `folder`."""

    folder: Path

    @property
    def _etc(self) -> Path:
        return self.folder / "etc"

    def home(self, account: Account) -> Path:
        """Where a user's sessions start."""
        return self.folder / "home" / account.name

    def write(self) -> None:
        """Write the files and make the homes."""
        self._etc.mkdir(parents=True, exist_ok=True)
        (self.folder / "home").mkdir(exist_ok=True)
        passwd, shadow, group = [], [], []
        for account in ACCOUNTS:
            home = self.home(account)
            home.mkdir(exist_ok=True, mode=0o700)
            put(home / ".bashrc", account.bashrc)
            for path in (home, home / ".bashrc"):
                os.chown(path, account.uid, account.uid)
            passwd.append(f"{account.name}:x:{account.uid}:{account.uid}::{home}:{account.shell}\n")
            shadow.append(f"{account.name}:*:19000:0:99999:7:::\n")
            if account.uid:
                group.append(f"{account.name}:x:{account.uid}:\n")
        for name, lines in (("passwd", passwd), ("shadow", shadow), ("group", group)):
            machine = Path("/etc", name).read_text().splitlines(keepends=True)
            others = [line for line in machine if name == "group" or not line.startswith("root:")]
            put(self._etc / name, "".join([*lines, *others]), mode=0o600 if name == "shadow" else 0o644)
        put(self._etc / "pam.sshd", _PAM.format(etc=self._etc))
        put(self._etc / "code", CODE)
        for name, text in (("enter.sh", _ENTER), ("check-code", _CHECK)):
            put(self._etc / name, text.format(etc=self._etc), mode=0o755)

    def enter(self, argv: Sequence[str]) -> list[str]:
        """Return the command that runs `argv` where the rig's accounts are seen, under the same process id."""
        return [*_UNSHARE, str(self._etc / "enter.sh"), *argv]


_UNSHARE = ["unshare", "--mount", "--propagation", "private", "--"]


def can_enter() -> bool:
    """Say whether this process may make mount namespaces."""
    return subprocess.run([*_UNSHARE, "true"], capture_output=True, check=False).returncode == 0
