"""`clean --cluster`: what it removes over real SSH beside real Slurm, and, above all, what it leaves."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from nexa_infra import launch_slurm_sweep
from nexa_infra.errors import NexaError, UnknownStateError
from nexa_infra.hosts.base import Completed
from nexa_infra.hosts.connections import close_all, host_of
from nexa_infra.hosts.local import LocalHost
from nexa_infra.hosts.ssh import SshHost
from nexa_infra.operations import clean, clean_cluster, launch, manage, steps
from nexa_infra.operations.clean import Leftover, NotRemovedError, Staying
from nexa_infra.operations.clean_cluster import leftovers_on, remove_on
from nexa_infra.operations.clean_text import line, stays, total
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import read_submissions
from nexa_infra.spec.cluster import Cluster
from tests.rig.accounts import ADA, BOB
from tests.rig.clusters import cluster_at
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig

DAY = 86400.0
KINDS: tuple[clean.Kind, ...] = ("run", "snapshot", "remains", "image")
CONFIG = """\
job: {{name: t, time: "00:05:00", memory: 100M{job}}}
launcher: {{type: command, command: {command}}}
sweep: {{parameters: {{n: [1, 2]}}}}
"""


@pytest.fixture(autouse=True)
def repository(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small git repository, to be in."""
    folder = tmp_path / "code"
    (folder / "pkg").mkdir(parents=True)
    (folder / "pkg" / "large.txt").write_text("x" * 10_000)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    monkeypatch.chdir(folder)
    yield folder
    close_all()


def config(code: str, command: str, job: str) -> Path:
    Path("code.txt").write_text(code)
    Path("t.yaml").write_text(CONFIG.format(command=command, job=job))
    return Path("t.yaml").absolute()


def a_run(cluster: Cluster, *, days: float = 0, code: str = "code\n", job: str = "", whole: bool = False) -> Run:
    """A run as if it had been made some days ago, that has ended (`whole`), or was never submitted."""
    asked = config(code, "[/bin/true]", job)
    if whole:
        run = manage.find(launch_slurm_sweep(asked, submit=True, cluster=cluster).run_id)
    else:
        run = steps.render(steps.sync(launch.plan_sweep(asked, cluster=cluster)))
    if days:
        backdate(Path(run.directory), days)
        os.utime(snapshot_of(run), (snapshot_of(run).stat().st_mtime - days * DAY,) * 2)
    return run


def running(cluster: Cluster) -> Run:
    """A run whose jobs go on."""
    run = steps.render(steps.sync(launch.plan_sweep(config("slow\n", '[sleep, "300"]', ""), cluster=cluster)))
    steps.submit(run)
    backdate(Path(run.directory), 40)
    os.utime(snapshot_of(run), (snapshot_of(run).stat().st_mtime - 40 * DAY,) * 2)
    return run


def snapshot_of(run: Run) -> Path:
    assert run.snapshot is not None
    return Path(run.snapshot.path)


def backdate(path: Path, days: float) -> None:
    subprocess.run(
        ["find", str(path), "-exec", "touch", "-h", "-d", f"{days * 24 + 1:.0f} hours ago", "{}", "+"], check=True
    )


def found(cluster: Cluster, older: float = 30 * DAY) -> dict[Path, Leftover]:
    return {each.path: each for each in leftovers_on(cluster, host_of(cluster), older)[0]}


def cleaned(cluster: Cluster, older: float = 30 * DAY) -> list[Path]:
    gone = leftovers_on(cluster, host_of(cluster), older)[0]
    for each in gone:
        remove_on(host_of(cluster), cluster, each)
    return [each.path for each in gone]


def a_leftover(path: Path, kind: clean.Kind = "run") -> Leftover:
    return Leftover(kind, path, 0, 0, 0.0)


@pytest.fixture
def a_day_has_gone_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean_cluster, "REMAINS_SECONDS", -5.0)


@pytest.mark.parametrize("where", ["cluster", "login_node"])
def test_old_runs_go_with_the_snapshots_that_only_they_used(where: str, request: pytest.FixtureRequest) -> None:
    cluster: Cluster = request.getfixturevalue(where)
    old, new = a_run(cluster, days=40, whole=True), a_run(cluster, whole=True)
    older = a_run(cluster, days=50, code="other\n", whole=True)
    base = Path(cluster.workdir)
    assert snapshot_of(old) == snapshot_of(new) != snapshot_of(older)
    os.utime(snapshot_of(old), (0, 0))

    host = host_of(cluster)
    before = host.round_trips if isinstance(host, SshHost) else 0
    gone, kept = leftovers_on(cluster, host, 30 * DAY)
    assert not isinstance(host, SshHost) or host.round_trips == before + 1
    assert [(each.kind, each.path) for each in gone] == [
        ("run", Path(older.directory)),
        ("run", Path(old.directory)),
        ("snapshot", snapshot_of(older)),
    ]
    assert kept == []
    for each in gone:
        assert each.path.exists(), "looking removes nothing"
        remove_on(host, cluster, each)
    assert sorted(path.name for path in (base / "runs").iterdir()) == [new.id]
    assert sorted(path.name for path in (base / "snapshots").iterdir()) == [".verified", snapshot_of(new).name]
    assert [path.name for path in (base / "snapshots" / ".verified").iterdir()] == [snapshot_of(new).name]
    assert (Path(new.directory) / "code" / "code.txt").read_text() == "code\n"
    assert leftovers_on(cluster, host, 30 * DAY) == ([], [])
    # The code can be brought again.
    assert (Path(a_run(cluster, code="other\n").directory) / "code" / "code.txt").read_text() == "other\n"


def test_sizes_and_inodes_are_those_of_the_folders_and_what_is_shared_counts_once(cluster: Cluster) -> None:
    run, other = a_run(cluster, days=40, whole=True), a_run(cluster, days=40, code="other\n")
    place = Path(run.directory)
    (place / "trials" / "0" / "model\nbin").write_bytes(b"x" * 100_000)
    (place / "trials" / "0" / "link").symlink_to("/usr")
    listed = found(cluster)
    assert listed[place].files == sum(1 for _ in place.rglob("*")) + 1
    assert 100_000 < listed[place].size < 200_000
    assert abs(listed[place].used - (listed[Path(other.directory)].used)) < 60

    one, two = snapshot_of(run), snapshot_of(other)
    assert (one / "pkg" / "large.txt").samefile(two / "pkg" / "large.txt")
    entries = [path for folder in (one, two) for path in (folder, *folder.rglob("*"))]
    inodes = {path.lstat().st_ino: path.lstat().st_size for path in entries}
    assert sum(listed[each].files for each in (one, two)) == pytest.approx(len(inodes), abs=1)
    assert sum(listed[each].size for each in (one, two)) == pytest.approx(sum(inodes.values()), abs=2)

    told = line(listed[place])
    assert told.startswith("run       ") and told.isprintable() and " 40 d  " in told
    said = total(list(listed.values()), dry_run=True, place=cluster.name)
    assert re.fullmatch(r"4 to remove on rig: [\d.]+ KiB in \d+ files and folders\. Nothing was removed: .*", said)


def test_a_run_with_jobs_in_the_queue_stays_and_so_does_its_snapshot(cluster: Cluster, slurm: SlurmRig) -> None:
    run = running(cluster)
    gone, kept = leftovers_on(cluster, host_of(cluster), 30 * DAY)
    job = read_submissions(run.files)[0].job_id
    assert job and gone == []
    assert kept == [Staying(Path(run.directory), f"its job {job} is in the queue")]
    assert stays(kept[0]).isprintable()
    with pytest.raises(NexaError, match="its jobs are in the queue again"):
        remove_on(host_of(cluster), cluster, a_leftover(Path(run.directory)))
    with pytest.raises(NexaError, match="it is in use again"):
        remove_on(host_of(cluster), cluster, a_leftover(snapshot_of(run), "snapshot"))
    assert slurm.states(job) and (Path(run.directory) / "run.json").exists() and snapshot_of(run).exists()

    steps.cancel(run, "enough")
    assert not found(cluster), "it was cancelled just now"
    backdate(Path(run.directory), 40)
    assert cleaned(cluster) == [Path(run.directory), snapshot_of(run)]


def test_where_squeue_cannot_be_asked_nothing_goes(cluster: Cluster, slurm: SlurmRig) -> None:
    run = a_run(cluster, days=40, whole=True)
    leftover = found(cluster)[Path(run.directory)]
    slurm.stop_controller()
    with pytest.raises(UnknownStateError, match="nothing is removed from .*: squeue cannot say how the jobs stand"):
        leftovers_on(cluster, host_of(cluster), 30 * DAY)
    with pytest.raises(NexaError, match="stays: squeue cannot say how its jobs stand: .*[cC]ontroller"):
        remove_on(host_of(cluster), cluster, leftover)
    assert (Path(run.directory) / "run.json").exists()


def test_what_is_being_submitted_or_was_used_since_stays(cluster: Cluster) -> None:
    run = a_run(cluster, days=40, whole=True)
    host, leftover = host_of(cluster), found(cluster)[Path(run.directory)]
    with (Path(run.directory) / "submissions" / ".sbatch.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(NexaError, match="stays: it is being submitted"):
            remove_on(host, cluster, leftover)
    (Path(run.directory) / "submissions" / "2.json").write_text("{}")
    with pytest.raises(NexaError, match="stays: it was used just now"):
        remove_on(host, cluster, leftover)
    assert not found(cluster)
    assert (Path(run.directory) / "run.json").exists()


def test_a_snapshot_that_is_taken_up_while_it_is_removed_stays(cluster: Cluster) -> None:
    run = a_run(cluster, days=40)
    host, snapshot = host_of(cluster), snapshot_of(run)
    remove_on(host, cluster, found(cluster)[Path(run.directory)])
    leftover = found(cluster)[snapshot]
    snapshot.touch()
    with pytest.raises(NexaError, match="stays: it is in use again"):
        remove_on(host, cluster, leftover)
    backdate(snapshot, 40)
    user = Path(cluster.workdir) / "runs" / "somebody's\nown"
    user.mkdir()
    (user / "code").symlink_to(f"../../snapshots/{snapshot.name}")
    assert not found(cluster)
    with pytest.raises(NexaError, match="stays: it is in use again"):
        remove_on(host, cluster, leftover)
    (user / "code").unlink()
    removing = threading.Thread(target=remove_on, args=(host, cluster, leftover))
    with (Path(cluster.workdir) / "snapshots.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        removing.start()
        removing.join(0.5)
        assert snapshot.exists(), "a sync holds the lock"
    removing.join(30)
    assert not snapshot.exists()


def test_a_run_elsewhere_keeps_its_snapshot(cluster: Cluster, workdir: Path) -> None:
    elsewhere = workdir.parent / "big disk"
    run = a_run(cluster, days=40, job=f", output_dir: {json.dumps(str(elsewhere))}")
    linked = a_run(cluster, days=40, code="linked\n")
    place = Path(linked.directory).rename(elsewhere / linked.id)
    Path(linked.directory).symlink_to(place)
    assert Path(run.directory).parent == elsewhere
    assert not found(cluster)
    with pytest.raises(NexaError, match="it stays"):
        remove_on(host_of(cluster), cluster, a_leftover(Path(run.directory)))
    with pytest.raises(NexaError, match="stays: it is no folder of yours"):
        remove_on(host_of(cluster), cluster, a_leftover(Path(linked.directory)))
    assert (place / "run.json").exists() and (Path(run.directory) / "run.json").exists()
    assert snapshot_of(run).exists() and snapshot_of(linked).exists()


def test_what_is_not_ours_stays(cluster: Cluster) -> None:
    run = a_run(cluster, days=40)
    base, host = Path(cluster.workdir), host_of(cluster)
    name = "20260101-000000-other-abcd"
    others = [
        base / "runs" / name,  # no run.json
        base / "runs" / "mine\nused 20260101-000000-other-abcd 0",
        base / "runs" / "20260101-000000-bobs-abcd",
        base / "snapshots" / "mine",
        base / "data",
    ]
    for path in others:
        path.mkdir()
        (path / "file").touch()
    for path in others[1:]:
        (path / "run.json").write_text("{}")
    links = [base / "runs" / "20260101-000000-linked-abcd", base / "snapshots" / "fedcba9876543210"]
    for link in links:
        link.symlink_to(base / "data")
    (base / "snapshots" / "0123456789abcdef").write_text("a file, not a folder\n")
    backdate(base, 400)
    os.chown(others[2], BOB.uid, BOB.uid)
    assert set(cleaned(cluster, 0)) == {Path(run.directory), snapshot_of(run)}
    for path in (*others, *links, base / "runs", base / "snapshots", base, Path("/"), base / "runs" / ".."):
        for kind in KINDS:
            with pytest.raises(NexaError, match=r"stays|not there any more"):
                remove_on(host, cluster, a_leftover(path, kind))
    assert all((path / "file").exists() for path in others)
    assert all(link.is_symlink() for link in links)
    assert (base / "snapshots" / "0123456789abcdef").exists()


@pytest.mark.parametrize("place", ["runs", "snapshots"])
def test_a_link_in_the_place_of_a_folder_is_not_followed(cluster: Cluster, place: str, workdir: Path) -> None:
    run = a_run(cluster, days=40)
    leftovers = list(found(cluster).values())
    elsewhere = (workdir / place).rename(workdir.parent / "elsewhere")
    (workdir / place).symlink_to(elsewhere)
    with pytest.raises(NexaError, match=f"{place} is a link, which is not followed"):
        leftovers_on(cluster, host_of(cluster), 30 * DAY)
    for each in leftovers:
        with pytest.raises(NexaError, match=f"{place} is a link, which is not followed"):
            remove_on(host_of(cluster), cluster, each)
    assert (Path(run.directory) / "run.json").exists() and snapshot_of(run).exists()


def test_a_link_inside_a_run_is_removed_and_what_it_leads_to_stays(cluster: Cluster, tmp_path: Path) -> None:
    run = a_run(cluster, days=40)
    data = tmp_path / "data"
    data.mkdir()
    (data / "set.bin").write_text("precious\n")
    data.chmod(0o500)
    (Path(run.directory) / "trials" / "data").symlink_to(data)
    (snapshot_of(run) / "data").symlink_to(data)
    backdate(snapshot_of(run), 40)
    assert set(cleaned(cluster)) == {Path(run.directory), snapshot_of(run)}
    assert (data / "set.bin").read_text() == "precious\n"
    assert data.stat().st_mode & 0o777 == 0o500


def test_what_crashes_left_goes_after_a_day_whatever_is_asked(cluster: Cluster, request: pytest.FixtureRequest) -> None:
    run = a_run(cluster)
    base = Path(cluster.workdir)
    left = [
        base / "snapshots" / ".staging-0123456789abcdef",
        base / "snapshots" / ".deleting-0123456789abcdef-0a1b2c3d",
        base / "runs" / ".staging-0123456789abcdef",
        base / "runs" / ".deleting-20260101-000000-old-abcd-0a1b2c3d",
    ]
    for path in left:
        (path / "submissions").mkdir(parents=True)
    (left[3] / "run.json").write_text("{}")
    (left[3] / "code").symlink_to(f"../../snapshots/{snapshot_of(run).name}")
    mark = base / "snapshots" / ".verified" / "0123456789abcdef"
    mark.touch()
    backdate(base, 400)
    Path(run.directory, "run.json").touch()
    for path in (base / "runs" / ".mine", base / "snapshots" / ".mine"):
        path.mkdir()
    assert not found(cluster, 0), "somebody may be at work"
    for path in left:
        with pytest.raises(NexaError, match="stays: it is in use"):
            remove_on(host_of(cluster), cluster, a_leftover(path, "remains"))
    request.getfixturevalue("a_day_has_gone_by")
    assert set(cleaned(cluster, 400 * DAY)) == set(left)
    assert not any(path.exists() for path in (*left, mark))
    assert sorted(path.name for path in (base / "runs").iterdir()) == [".mine", run.id]
    assert snapshot_of(run).exists() and (base / "snapshots" / ".mine").exists()


@pytest.fixture
def adas(sshd: SshRig) -> Cluster:
    """The rig as the cluster of a user who is not root, in a workdir of this test's own."""
    place = Path(tempfile.mkdtemp(dir=sshd.accounts.home(ADA)))
    os.chown(place, ADA.uid, ADA.uid)
    return cluster_at(sshd, place / "my work", user="ada")


def test_what_a_trial_made_read_only_goes(adas: Cluster, sshd: SshRig) -> None:
    run = a_run(adas, days=40)
    trial = Path(run.directory) / "trials" / "0"
    for path in (trial / "sealed" / "deeper", trial / "unseen"):
        path.mkdir(parents=True)
        (path / "file").touch()
    subprocess.run(["chown", "-R", f"{ADA.uid}:{ADA.uid}", str(trial)], check=True)
    for path in (trial / "sealed" / "deeper", trial / "sealed", trial / "unseen", trial, Path(run.directory)):
        path.chmod(0o000 if path.name == "unseen" else 0o500)
    snapshot_of(run).chmod(0o500)
    assert set(cleaned(adas)) == {Path(run.directory), snapshot_of(run)}
    assert not list((Path(adas.workdir) / "runs").iterdir())


def test_what_cannot_be_deleted_is_told_and_is_a_run_no_more(adas: Cluster) -> None:
    run = a_run(adas, days=40)
    place = Path(run.directory) / "trials" / "0" / "of root"
    place.mkdir(parents=True)
    (place / "file").touch()
    host, leftover = host_of(adas), found(adas)[Path(run.directory)]
    with pytest.raises(NotRemovedError, match=r"could not be removed: rm: .*of root/file.*Permission denied"):
        remove_on(host, adas, leftover)
    (left,) = (Path(adas.workdir) / "runs").iterdir()
    assert left.name.startswith(f".deleting-{run.id}-")
    with pytest.raises(NexaError, match="stays: it is no folder of yours"):
        remove_on(host, adas, leftover)
    assert set(found(adas)) == {snapshot_of(run)}, "a run that is being deleted uses nothing"


def test_the_folder_of_another_user_that_cannot_be_looked_into_keeps_every_snapshot(adas: Cluster) -> None:
    run = a_run(adas, days=40)
    bobs = Path(adas.workdir) / "runs" / "bob's"
    bobs.mkdir(mode=0o700)
    os.chown(bobs, BOB.uid, BOB.uid)
    snapshot = snapshot_of(run)
    gone, kept = leftovers_on(adas, host_of(adas), 30 * DAY)
    assert [each.path for each in gone] == [Path(run.directory)]
    assert [each.path for each in kept] == [snapshot.parent] and "cannot be looked into" in kept[0].reason
    remove_on(host_of(adas), adas, gone[0])
    with pytest.raises(NexaError, match="stays: it is in use again"):
        remove_on(host_of(adas), adas, a_leftover(snapshot, "snapshot"))
    assert bobs.is_dir() and snapshot.is_dir()


def test_the_copy_here_of_a_run_that_was_removed_there_is_removed_by_clean(cluster: Cluster, home: Path) -> None:
    run = a_run(cluster, days=40, whole=True)
    for path in (*run.files.submissions.glob("*.json"), run.files.record):
        path.write_text(re.sub(r'("created_at": ")\d{4}', r"\g<1>2020", path.read_text()))
    backdate(run.files.path, 40)
    cleaned(cluster)
    gone, kept = clean.leftovers(30 * DAY)
    assert [each.path for each in gone] == [home / "runs" / run.id] and kept == []
    clean.remove(gone[0])
    assert not run.files.path.exists()


DIGESTS = ("ab" * 32, "cd" * 32, "ef" * 32)


def in_image(run: Run, digest: str, *, days: float = 40) -> Run:
    """Say that a run's trials run in an image."""
    record = Path(run.directory) / "run.json"
    data = json.loads(record.read_text())
    data["container"] = {"asked": "i:1", "image": f"r.org/i@sha256:{digest}", "digest": f"sha256:{digest}"}
    record.write_text(json.dumps(data, indent=2))
    backdate(Path(run.directory), days)
    return run


def a_sif(cluster: Cluster, digest: str, *, days: float = 40) -> Path:
    images = Path(cluster.workdir) / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name, size in ((f"{digest}.sif", 1000), (f"{digest}.log", 10)):
        (images / name).write_bytes(b"x" * size)
        backdate(images / name, days)
        os.chown(images / name, images.parent.stat().st_uid, images.parent.stat().st_gid)
    return images / f"{digest}.sif"


@pytest.mark.parametrize("where", ["cluster", "login_node"])
def test_a_sif_goes_with_the_last_run_that_asks_for_it(where: str, request: pytest.FixtureRequest) -> None:
    cluster: Cluster = request.getfixturevalue(where)
    old, new = in_image(a_run(cluster), DIGESTS[0]), in_image(a_run(cluster), DIGESTS[1], days=0)
    Path(new.directory, "run.json").touch()
    idle, used = (a_sif(cluster, digest) for digest in DIGESTS[:2])
    a_sif(cluster, DIGESTS[2], days=10)
    host = host_of(cluster)
    before = host.round_trips if isinstance(host, SshHost) else 0
    gone, kept = leftovers_on(cluster, host, 30 * DAY)
    assert not isinstance(host, SshHost) or host.round_trips == before + 1
    assert [(each.kind, each.path, each.files) for each in gone if each.kind != "run"] == [("image", idle, 2)]
    assert gone[0].path == Path(old.directory) and kept == []
    assert gone[1].size == 1010
    with pytest.raises(NexaError, match="stays: it is in use again"):
        remove_on(host, cluster, gone[1])  # its run is still there
    for each in gone:
        remove_on(host, cluster, each)
    left = sorted(path.name for path in idle.parent.iterdir())
    assert left == sorted(f"{digest}.{end}" for digest in DIGESTS[1:] for end in ("log", "sif"))
    with pytest.raises(NexaError, match="stays: it is in use again"):
        remove_on(host, cluster, a_leftover(used, "image"))
    assert not found(cluster)


def test_a_sif_that_is_built_or_was_used_since_stays(cluster: Cluster) -> None:
    sif = a_sif(cluster, DIGESTS[0])
    lock, beat = (sif.with_name(f"{sif.name}.{name}") for name in ("lock", "beat"))
    lock.symlink_to("n1.77.123")
    beat.touch()
    backdate(lock, 40)
    host = host_of(cluster)
    assert not found(cluster, 0)
    with pytest.raises(NexaError, match="stays: it was used just now"):
        remove_on(host, cluster, a_leftover(sif, "image"))
    backdate(beat, 40)
    assert found(cluster)[sif].files == 4
    os.utime(sif, (time.time(), sif.stat().st_mtime))  # it was read
    assert not found(cluster)
    with pytest.raises(NexaError, match="stays: it was used just now"):
        remove_on(host, cluster, a_leftover(sif, "image"))
    backdate(sif, 40)
    assert cleaned(cluster) == [sif]
    assert not list(sif.parent.iterdir())


def test_a_run_elsewhere_or_behind_a_link_keeps_its_sif(cluster: Cluster, workdir: Path) -> None:
    elsewhere = workdir.parent / "big disk"
    in_image(a_run(cluster, job=f", output_dir: {json.dumps(str(elsewhere))}"), DIGESTS[0])
    linked = in_image(a_run(cluster), DIGESTS[1])
    Path(linked.directory).symlink_to(Path(linked.directory).rename(elsewhere / linked.id))
    somebody = workdir / "runs" / "somebody's\nown"
    somebody.mkdir()
    (somebody / "run.json").write_text(f'{{"container": {{"digest": "sha256:{DIGESTS[2]}"}}}}')
    for digest in DIGESTS:
        a_sif(cluster, digest)
    assert not [path for path, each in found(cluster).items() if each.kind == "image"]
    (somebody / "run.json").unlink()
    assert [path.stem for path, each in found(cluster).items() if each.kind == "image"] == [DIGESTS[2]]


def test_what_else_lies_among_the_images_stays(cluster: Cluster, workdir: Path) -> None:
    images = workdir / "images"
    for name in (f"{DIGESTS[0]}.sif", f"{DIGESTS[1]}.tar", "mine.sif", f"x{DIGESTS[1]}.sif"):
        images.mkdir(parents=True, exist_ok=True)
        (images / name).mkdir() if name.startswith(DIGESTS[0]) else (images / name).touch()
    bobs = a_sif(cluster, DIGESTS[2])
    for path in (bobs, bobs.with_suffix(".log")):
        os.chown(path, BOB.uid, BOB.uid)
    backdate(images, 400)
    before = sorted(images.iterdir())
    assert not found(cluster, 0)
    for path in before:
        with suppress(NexaError):
            remove_on(host_of(cluster), cluster, a_leftover(path, "image"))
        with pytest.raises(NexaError, match="stays"):
            remove_on(host_of(cluster), cluster, a_leftover(path))
    assert sorted(images.iterdir()) == before
    for path in before:
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
    images.rmdir()
    elsewhere = workdir.parent / "elsewhere"
    elsewhere.mkdir()
    images.symlink_to(elsewhere)
    sif = a_sif(cluster, DIGESTS[0])
    assert not found(cluster, 0)
    with pytest.raises(NexaError, match="stays: images is a link, which is not followed"):
        remove_on(host_of(cluster), cluster, a_leftover(sif, "image"))
    assert sif.exists()


def test_a_record_of_another_user_that_cannot_be_read_keeps_every_sif(adas: Cluster) -> None:
    run = in_image(a_run(adas), DIGESTS[0])
    sif = a_sif(adas, DIGESTS[1])
    record = Path(adas.workdir) / "runs" / "bob's" / "run.json"
    record.parent.mkdir(mode=0o755)
    record.touch(0o600)
    for path in (record.parent, record):
        os.chown(path, BOB.uid, BOB.uid)
    gone, kept = leftovers_on(adas, host_of(adas), 30 * DAY)
    assert Path(run.directory) in [each.path for each in gone]
    assert "image" not in [each.kind for each in gone]
    assert [stays(each) for each in kept] == [
        f"{sif.parent} stays: a run.json in runs/ cannot be read, and may ask for them"
    ]
    with pytest.raises(NexaError, match="stays: it is in use again"):
        remove_on(host_of(adas), adas, a_leftover(sif, "image"))
    assert sif.exists()


def test_a_workdir_that_is_not_there_has_nothing_to_remove(cluster: Cluster) -> None:
    assert leftovers_on(cluster, host_of(cluster), 0) == ([], [])
    Path(cluster.workdir).mkdir()
    assert leftovers_on(cluster, host_of(cluster), 0) == ([], [])
    with pytest.raises(NexaError, match="no absolute path"):
        leftovers_on(cluster.model_copy(update={"workdir": "work"}), host_of(cluster), 0)


class Listening(LocalHost):
    """A host that keeps the scripts it is sent, and runs none."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def script(self, text: str, *, timeout: float | None = None) -> Completed:
        self.asked.append(text)
        return Completed(("sh",), 66, "", "")


def test_the_scripts_pass_shellcheck() -> None:
    host, cluster = Listening(), Cluster(name="here", workdir="/it's $here")
    leftovers_on(cluster, host, 30 * DAY)
    run = a_leftover(Path(cluster.workdir) / "runs" / "20260101-000000-t-abcd")
    for leftover in (run, replace(run, kind="snapshot", path=Path(cluster.workdir) / "snapshots" / ("0" * 16))):
        with pytest.raises(NexaError, match="not there any more"):
            remove_on(host, cluster, leftover)
    for text in host.asked:
        # SC1091: /etc/profile is the site's own. SC2016: what is quoted is for another shell.
        argv = ["shellcheck", "--shell=sh", "--exclude=SC2016,SC1091", "-"]
        done = subprocess.run(argv, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
