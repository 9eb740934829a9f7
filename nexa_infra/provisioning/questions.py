"""What a cluster's login node is asked, by one script; and its answers, one a question."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Literal

from nexa_infra.hosts.base import Completed
from nexa_infra.hosts.shell import quote
from nexa_infra.scheduling.slurm.client import PRELUDE
from nexa_infra.scheduling.slurm.text import QUEUE_FORMAT
from nexa_infra.spec.cluster import Cluster

# sacctmgr's fields, short as every version since 20.11 takes them.
OF_ASSOCIATIONS = ("MaxSubmit", "MaxJobs", "MaxWall", "MaxTRES", "GrpSubmit", "GrpJobs", "GrpTRES", "GrpTRESMins")
OF_QOS = ("MaxSubmitPU", "MaxJobsPU", "MaxWall", "MaxTRESPU", "MaxSubmitPA", "GrpSubmit", "GrpJobs", "GrpTRES")

Outcome = Literal["ran", "missing", "cut", "not asked"]


@dataclass(frozen=True)
class Answer:
    """What one command said; `cut` is one that did not end within `seconds`."""

    outcome: Outcome = "not asked"
    code: int = 0
    stdout: str = ""
    stderr: str = ""
    seconds: int = 0

    @property
    def works(self) -> bool:
        """Whether the command ran, and did what it was asked."""
        return self.outcome == "ran" and self.code == 0

    @property
    def words(self) -> str:
        """Its last words, or ours where it has none."""
        match self.outcome:
            case "missing":
                return "not installed"
            case "cut":
                return f"no answer within {self.seconds} s"
        lines = (self.stderr.strip() or self.stdout.strip()).splitlines()
        said = re.sub(r"^[\w./-]+(?: error)?: (?:error: |fatal: )?", "", lines[-1].strip()) if lines else ""
        return said[-200:] or f"exit code {self.code}"


def questions(cluster: Cluster, mark: str, *, workdir: str = "") -> str:
    """Return the script; it runs in a shell of its own, which reads nothing of what is sent after it."""
    values = {
        "mark": mark,
        "workdir": workdir if workdir.startswith("/") else "",
        "probe_name": f".nexa-doctor-{secrets.token_hex(8)}",
        "partition": cluster.partition or "",
        "account": cluster.account or "",
        "queue_format": QUEUE_FORMAT,
        "association_fields": ",".join(("Cluster", "Account", "Partition", "QOS", *OF_ASSOCIATIONS)),
        "qos_fields": ",".join(("Name", *OF_QOS)),
    }
    assignments = "".join(f"{name}={quote(value)}\n" for name, value in values.items())
    return f"(\n{assignments}{PRELUDE}{_QUESTIONS}) </dev/null\n"


def read_answers(done: Completed, mark: str) -> dict[str, Answer]:
    """Read what the script printed: on each stream a line of the mark and a name, then that command's words.

    Standard output has another line after them, with the exit code and the seconds that the command was given.
    """
    stdout, stderr = (_pieces(stream, mark) for stream in (done.stdout, done.stderr))
    answers = {}
    for name, (text, end) in stdout.items():
        code, _, seconds = end.partition(" ")
        if not seconds.isdigit():
            continue  # it never ended
        outcome: Outcome = "ran"
        if code == "missing":
            outcome = "missing"
        elif code in {"124", "137"}:  # timeout's own, and that of a command which it had to kill
            outcome = "cut"
        number = int(code) if code.isdigit() else 0
        answers[name] = Answer(outcome, number, text, stderr.get(name, ("", ""))[0], int(seconds))
    return answers


def _pieces(stream: str, mark: str) -> dict[str, tuple[str, str]]:
    """Cut a stream at its marks: name -> what came after it, and what the line that ends it says."""
    _, *pieces = re.split(rf"^{re.escape(mark)} (.*)\n", stream, flags=re.MULTILINE)
    found: dict[str, tuple[str, str]] = {}
    name = ""
    for head, text in zip(pieces[::2], pieces[1::2], strict=True):
        if head.startswith("= "):
            found[name] = (found[name][0], head[2:])
        else:
            name = head
            found[name] = (text.removesuffix("\n"), "")
    return found


# ask NAME SECONDS COMMAND...: its words on either stream, and its exit code, between marks.
_QUESTIONS = r"""
export LC_ALL=C SLURM_BITSTR_LEN=0
ask() {
    name=$1 seconds=$2
    shift 2
    printf '\n%s %s\n' "$mark" "$name"
    printf '\n%s %s\n' "$mark" "$name" >&2
    if command -v "$1" >/dev/null 2>&1; then
        timeout -k 2 "$seconds" "$@"
        code=$?
    else
        code=missing
    fi
    printf '\n%s = %s %s\n' "$mark" "$code" "$seconds"
}
ask began 5 date +%s.%N
user=$(id -un)
ask user 5 printf '%s\n' "$user"
ask groups 5 id -Gn
ask machine 5 uname -n
ask path 5 printf '%s\n' "$PATH"

ask bash 5 bash --version
ask rsync 5 rsync --version
ask python 5 python3 --version
ask lacking 5 sh -c 'for tool; do command -v "$tool" >/dev/null 2>&1 || printf "%s\n" "$tool"; done' sh \
    flock setsid readlink base64 tar
for runtime in apptainer singularity enroot; do
    case $runtime in enroot) ask enroot 5 enroot version ;; *) ask $runtime 5 $runtime --version ;; esac
done
ask docker 5 docker version --format '{{.Server.Version}}'

ask slurm 5 scontrol --version
if test "$code" = 0; then
    ask commands 5 sh -c 'for tool; do command -v "$tool" >/dev/null 2>&1 || printf "%s\n" "$tool"; done' sh \
        sbatch squeue scancel srun sinfo
    ask pyxis 5 sh -c 'srun --help 2>&1 | grep -e --container-image'
    ask config 15 scontrol show config
    controller=$code
    ask ping 15 scontrol ping
    # Each question to a controller that does not answer costs ten seconds: one is enough.
    if test "$controller" = 0; then
        ask partitions 15 scontrol show partition -o
        ask nodes 15 sinfo -h -N -o '%N|%R|%G|%c|%m|%t'
        ask queue 15 squeue -h -u "$user" -o "$queue_format"
        set -- --test-only --output=/dev/null --chdir=/ --wrap=true
        test -z "$partition" || set -- "$@" --partition="$partition"
        test -z "$account" || set -- "$@" --account="$account"
        ask submit 15 sbatch "$@"
    fi
    ask sacct 15 sacct -nPX -u "$user" -S now-5minutes -o JobID
    if test "$code" = 0; then
        ask associations 15 sacctmgr -nP show assoc user="$user" format="$association_fields"
        ask qos 15 sacctmgr -nP show qos format="$qos_fields"
    fi
fi

if test -n "$workdir"; then
    nearest=$workdir
    until test -e "$nearest" || test -L "$nearest"; do
        nearest=${nearest%/*}
        nearest=${nearest:-/}
    done
    ask nearest 15 printf %s "$nearest"
    probe=${nearest%/}/$probe_name
    trap 'rm -rf -- "$probe"' EXIT
    trap 'exit 1' HUP INT PIPE TERM
    ask make 15 mkdir -- "$probe"
    if test "$code" = 0; then
        ask write 15 sh -c 'head -c 65536 /dev/zero >"$1/file"' sh "$probe"
        ask lock 15 flock -n "$probe/lock" true
        ask link 15 sh -c 'ln -sT -- owner "$1/link" && ! ln -sT -- other "$1/link" 2>/dev/null' sh "$probe"
        ask session 15 setsid true
        ask execute 15 sh -c 'printf "#!/bin/sh\n" >"$1/run" && chmod +x "$1/run" && "$1/run"' sh "$probe"
        ask remove 15 rm -rf -- "$probe"
    fi
    ask space 15 df -PTk -- "$nearest"
    ask inodes 15 df -Pi -- "$nearest"
    ask quota 10 quota -ws
    ask lfs 10 lfs quota -h -u "$user" "$nearest"
fi
ask ended 5 date +%s.%N
"""
