"""What a cluster is asked before a run is submitted: one script, a section a question."""

from __future__ import annotations

import re

from nexa_infra.hosts.shell import join, quote, quote_path
from nexa_infra.monitoring.prices import load_price_book
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.needs import checkpoints_check, container_check, torchrun_check
from nexa_infra.scheduling.script import script_of
from nexa_infra.scheduling.slurm.client import section


def questions(run: Run, *, facts: bool) -> str:
    """Return the one script that asks everything, what changes seldom only with `facts`; it only reads."""
    job, cluster = run.config.job, run.cluster
    # A chain's job is cut to the partition's limit, whatever it asks for.
    link = "1" if run.config.checkpoint.chain_until_done else None
    text = script_of(run, walltime=link).text
    partition = job.partition or (cluster.partition if cluster else None)
    where = f"-p {quote(partition)} " if partition else ""
    candidates = _candidates(job.gpu_type) if job.gpus_per_node and job.gpu_type else ()
    # One task stands for all: how large an array may be, and a queue, is known from what else is asked.
    argv = ["sbatch", "--test-only", "--array=0"]
    seldom = [
        section("config", "scontrol show config"),
        section("partitions", "scontrol show partition -o"),
        section(
            "associations", 'sacctmgr -nP show assoc where user="$(id -un)" format=Account,Partition,QOS,MaxSubmitJobs'
        ),
        section("qos", "sacctmgr -nP show qos format=Name,MaxSubmitJobsPerUser,MaxWall"),
        section("nodes", "sinfo -h -o '%R|%G'"),
    ]
    now = [
        section("queue", "SLURM_BITSTR_LEN=0 squeue -h -u \"$(id -un)\" -o '%A|%F|%K|%T|%r|%j'"),
        f"nexa_place={quote(run.workdir)}\n",
        'while [ ! -e "$nexa_place" ]; do nexa_place=$(dirname -- "$nexa_place"); done\n',
        section("workdir", _workdir_check(run.workdir)),
        section("space", "df -Pk -- \"$nexa_place\" | awk 'NR > 1 { print $(NF-2) }'"),
        section("inodes", "df -Pi -- \"$nexa_place\" | awk 'NR > 1 { print $(NF-4), $(NF-2) }'"),
        section("needs", f"{checkpoints_check(run)}\n{torchrun_check(run)}\n{container_check(run)}"),
        section("env_file", _env_file_check(job.env_file) if job.env_file else "true"),
        _choose_gpu(where, candidates, job.gpus_per_node),
        section("gpu", 'printf %s "$nexa_gpu"'),
        f'nexa_options=; [ -z "$nexa_gpu" ] || nexa_options=--gpus-per-node=$nexa_gpu:{job.gpus_per_node}\n',
        section(
            "test",
            f'cd / && {join(argv)} ${{nexa_options:+"$nexa_options"}} '
            f"<<'NEXA_SCRIPT'\n{_options_only(text)}\nNEXA_SCRIPT",
        ),
    ]
    return "".join([*(seldom if facts else ()), *now])


def _options_only(script: str) -> str:
    """Return a script's shebang and options: what it does is not tested."""
    head = [line for line in script.splitlines() if line.startswith(("#!", "#SBATCH"))]
    return "\n".join([*head, "true"])


def _workdir_check(workdir: str) -> str:
    place = quote(workdir)
    return f"""
tell() {{ printf '%s: name another workdir in the block of the cluster\\n' "$1"; }}
if [ ! -d "$nexa_place" ]; then
  tell "the workdir "{place}" lies below $nexa_place, which is no folder"
elif [ ! -w "$nexa_place" ] || [ ! -x "$nexa_place" ]; then
  nexa_owner=$(stat -c '%U, mode %a' -- "$nexa_place")
  tell "the workdir "{place}" cannot be written: $nexa_place belongs to $nexa_owner"
fi
for nexa_tool in rsync flock setsid tar base64; do
  command -v $nexa_tool >/dev/null 2>&1 ||
    printf '%s is not installed on the login node: ask its administrators for it\\n' $nexa_tool
done"""


def _env_file_check(path: str) -> str:
    return f"""
nexa_file={quote_path(path)}
if [ ! -f "$nexa_file" ]; then
  printf '%s is not there: make it on the cluster, and chmod 600 it\\n' "$nexa_file"
elif [ ! -r "$nexa_file" ]; then
  printf '%s cannot be read by %s\\n' "$nexa_file" "$(id -un)"
else
  nexa_mode=$(stat -L -c %a -- "$nexa_file")
  case $nexa_mode in
    400|600) ;;
    *) printf '%s has mode %s, so that others may read it: chmod 600 it\\n' "$nexa_file" "$nexa_mode" ;;
  esac
fi"""


def _candidates(gpu_type: str) -> tuple[str, ...]:
    """Return the names that a site may have for a GPU type, as `_choose_gpu` spells them."""
    return tuple(sorted({re.sub(r"[\s-]+", "_", name.lower()) for name in load_price_book().names(gpu_type)}))


def _choose_gpu(where: str, candidates: tuple[str, ...], count: int) -> str:
    """Return shell that finds the site's own name for a GPU among its nodes' gres."""
    if not candidates or not count:
        return "nexa_gpu=\n"
    known = " ".join(candidates)
    return (
        f"nexa_gpu=$(sinfo -h {where}-o %G | tr , '\\n' | awk -F'[:(]' -v known={quote(f' {known} ')} '\n"
        '  $1 == "gpu" && $2 !~ /^[0-9]*$/ { name = tolower($2); gsub(/-/, "_", name)\n'
        '    sub(/^(nvidia|tesla|amd)_/, "", name); if (index(known, " " name " ")) { print $2; exit } }\')\n'
    )
