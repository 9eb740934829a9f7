"""What a cluster's login node itself must have: tools, containers, a clock that is right, and a workdir that works."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from nexa_infra.provisioning.check import ASK_FOR, FEW_INODES, GIB, Check, numbers
from nexa_infra.provisioning.inspect import Inspection

_OLDEST_BASH = (4, 2)
_MOST_SKEW = 60.0  # seconds
_ANOTHER = "name another `workdir` in the cluster's block"


def check_tools(found: Inspection) -> Iterator[Check]:
    """Look for the tools that every run needs."""
    bash, rsync, python = (found.version(name) for name in ("bash", "rsync", "python"))
    old = numbers(bash) < _OLDEST_BASH
    yield Check("bash", not old, bash or found.answer("bash").words, f"{ASK_FOR} bash 4.2 or newer" if old else "")
    if not rsync:
        yield Check("rsync", False, f"{found.answer('rsync').words} on {found.machine}", f"{ASK_FOR} rsync")
    elif shutil.which("rsync") is None:
        yield Check("rsync", False, f"{rsync}, but none on this machine", "apt-get install rsync, or your system's own")
    else:
        yield Check("rsync", True, rsync)
    remedy = "" if python else "name what brings one in job.setup: modules, conda, venv or uv"
    yield Check("Python", bool(python), python or f"python3: {found.answer('python').words} on {found.machine}", remedy)
    if found.lacking:
        yield Check("tools", False, f"not installed: {', '.join(found.lacking)}", f"{ASK_FOR} them")


def check_containers(found: Inspection) -> Iterator[Check]:
    """Look for what the cluster's block says containers are run by."""
    names, asked = ("apptainer", "singularity", "docker", "enroot"), found.cluster.runtime
    ready = {name: found.version(name) for name in names if found.version(name)}
    if found.answer("pyxis").works:
        ready["pyxis"] = "(srun --container-image)"
    tried = {name for name in names if found.answer(name).outcome in {"ran", "cut"}}
    mute = [f"{name} gives no answer" for name in names if name in tried - ready.keys()]
    told = ", ".join([*(f"{name} {version}" for name, version in ready.items()), *mute]) or f"none on {found.machine}"
    usable = [name for name in ready if name != "enroot"]  # it runs jobs only through Pyxis
    if asked in {"auto", "none"} or asked in ready:
        yield Check("containers", True, told if usable or asked == "none" else f"{told}: trials run without")
    else:
        set_it = f"set `runtime` in the cluster's block to {' or '.join(usable) or 'none'}"
        remedy = f"{set_it}, or {ASK_FOR} {asked}; where a module brings it, load that in job.setup"
        yield Check(
            "containers",
            False,
            f"no {asked} that works on {found.machine}{f'; {told}' if ready or mute else ''}",
            remedy,
        )


def check_clock(found: Inspection) -> Iterator[Check]:
    """Compare its clock with this machine's."""
    skew = found.clock.skew
    if not found.remote:
        return
    if abs(skew) < 1:
        yield Check("clock", True, f"agrees with this machine's within {max(abs(skew), found.clock.doubt):.1f} s")
        return
    fine = abs(skew) <= _MOST_SKEW
    remedy = "" if fine else "set the wrong one (`timedatectl` on both): times and costs go by it"
    text = f"{abs(skew):,.0f} s {'ahead of' if skew > 0 else 'behind'} this machine's"
    yield Check("clock", fine, text, remedy)


# What a run needs of its workdir: the question, what is wrong where it fails, and what to do.
_NEEDED = (
    ("make", "no folder can be made", _ANOTHER),
    ("write", "no file can be written", _ANOTHER),
    ("lock", "flock does not lock", "have it mounted with locks that all nodes see, or " + _ANOTHER),
    ("link", "ln -sT makes no links", _ANOTHER),
    ("session", "setsid does not work", f"{ASK_FOR} util-linux"),
    ("remove", "what was made cannot be removed", _ANOTHER),
)


def check_workdir(found: Inspection) -> Iterator[Check]:
    """Look at the workdir: whether it can be written, and how much."""
    place = found.cluster.workdir
    if not place.startswith("/"):
        yield Check("workdir", False, f"{place} is no absolute path", "write it from / on in the cluster's block")
        return
    if not found.nearest:
        yield Check("workdir", False, f"{place} does not answer: its file system hangs", f"wait, or {_ANOTHER}")
        return
    asked = [(found.answer(name), trouble, remedy) for name, trouble, remedy in _NEEDED]
    wrong = next((each for each in asked if each[0].outcome != "not asked" and not each[0].works), None)
    if wrong:
        answer, trouble, remedy = wrong
        where = "there" if found.nearest == place else f"in {found.nearest}"
        yield Check("workdir", False, f"{place}: {trouble} {where}: {answer.words.rpartition(': ')[2]}", remedy)
    else:
        # Job scripts are read by bash, and programs by what the launcher names: neither needs to be executable.
        noexec = (
            "" if found.answer("execute").works else "; programs in it cannot be executed: run them by python or bash"
        )
        yield Check("workdir", True, f"{place} can be {'written' if found.nearest == place else 'made'}{noexec}")
    cleaning = f"`nexa-infra clean --cluster {found.cluster.name}`"
    if found.disk:
        free, inodes = found.disk.free_kib * 1024 / GIB, found.disk.free_inodes
        fine = free >= 1 and (inodes is None or inodes >= FEW_INODES)
        files = f" and {inodes:,} inodes" if inodes is not None else ""
        remedy = "" if fine else f"free some ({cleaning}), or {_ANOTHER}"
        yield Check("space", fine, f"{free:,.1f} GiB{files} free ({found.disk.kind})", remedy)
    for quota in found.quotas:
        pairs = ((quota.used, quota.limit, ""), (quota.files, quota.files_limit, " files"))
        told = [f"{used} of {limit}{unit}" for used, limit, unit in pairs if limit.rstrip("kK") != "0"]
        remedy = f"remove what is not needed ({cleaning}): soon nothing can be written" if quota.over else ""
        yield Check("quota", not quota.over, f"{' and '.join(told) or 'no limit'} in {quota.place}", remedy)
    if not found.quotas:
        yield Check(
            "quota",
            True,
            "none is set" if found.answer("quota").outcome == "ran" else "not known: there is no `quota` here",
        )
