"""Code brought to another host, over a real sshd: an exact copy, hard-linked, verified; and what must not happen."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.errors import HostError, SyncError
from nexa_infra.hosts.connections import close_all
from nexa_infra.hosts.login import Login
from nexa_infra.hosts.ssh import SshHost
from nexa_infra.operations.selection import chosen
from nexa_infra.operations.sync import snapshots_locked, sync_repository
from nexa_infra.runs.record import Snapshot
from nexa_infra.spec.run import SyncRules
from tests.rig.accounts import ADA, ROOT, Account
from tests.rig.ssh import SshRig

ROOT_FOLDER = Path(__file__).resolve().parents[2]
HOSTILE = [
    "a b",
    "new\nline",
    "-dash",
    "it's",
    '"',
    "back\\slash",
    "#x",
    ";x",
    "c\rr",
    "*",
    "~",
    "$HOME",
    "日本",
    "\udcff",
]


def login_of(sshd: SshRig, user: Account = ROOT) -> Login:
    return Login(sshd.host, user.name, sshd.port, str(sshd.key), str(sshd.known_hosts))


@pytest.fixture
def host(sshd: SshRig) -> Iterator[SshHost]:
    """The host, to which nobody has logged in yet."""
    made = SshHost(login_of(sshd))
    yield made
    made.close()


@pytest.fixture
def ada(sshd: SshRig) -> Iterator[SshHost]:
    """The host for a plain user."""
    made = SshHost(login_of(sshd, ADA))
    yield made
    made.close()


@pytest.fixture
def there(rig_folder: Path) -> Path:
    """A folder on the host."""
    return rig_folder / "it's there"


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A git repository of some files with names, modes and links of every kind."""
    root = tmp_path / "my code"
    (root / "pkg" / "deep").mkdir(parents=True)
    for name in HOSTILE:
        (root / "pkg" / name).write_text(f"content of {name!r}", errors="surrogateescape")
        (root / name).mkdir()
        (root / name / name).write_text("x")
    for mode in (0o755, 0o644, 0o600, 0o444, 0o640):
        (root / f"mode-{mode:o}").write_text("x" * mode)
        (root / f"mode-{mode:o}").chmod(mode)
    (root / "empty").touch()
    (root / "dangling").symlink_to("/nowhere\n")
    (root / "up").symlink_to("..")
    (root / "pkg" / "deep" / "link").symlink_to("../-dash")
    (root / "train.py").write_text("lr = 1\n")
    (root / ".gitignore").write_text("*.log\n")
    (root / "pkg" / "noise.log").write_text("ignored")
    subprocess.run(["git", "-C", root, "init", "--quiet"], check=True)
    subprocess.run(["git", "-C", root, "add", "pkg", "train.py"], check=True)
    return root


def described(root: Path, names: list[str]) -> dict[str, tuple[object, ...]]:
    """What files are: their modes, when they were changed, and what they hold."""
    told: dict[str, tuple[object, ...]] = {}
    for name in names:
        path = root / name
        seen = path.lstat()
        if path.is_symlink():
            told[name] = ("link", os.fsencode(path.readlink()))
        else:
            told[name] = (seen.st_mode, seen.st_mtime_ns, path.read_bytes())
    return told


def names_in(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_symlink() or not path.is_dir())


def assert_exact(made: Snapshot, code: Path) -> None:
    names = sorted(chosen(code, SyncRules(), target=None, include_runs=False))
    assert names_in(Path(made.path)) == names
    assert described(Path(made.path), names) == described(code, names)
    assert made.files == len(names)


def no_rsync(host: SshHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("rsync was started")

    monkeypatch.setattr(host, "rsync", never)


def inside(folder: Path) -> set[str]:
    return {path.name for path in (folder / "snapshots").iterdir() if path.name != ".verified"}


def test_the_copy_is_exact_and_made_over_one_login(host: SshHost, sshd: SshRig, code: Path, there: Path) -> None:
    made = sync_repository(there, root=code, host=host)
    assert made.path == f"{there}/snapshots/{made.hash}"
    assert_exact(made, code)
    assert sshd.logins() == 1
    assert host.round_trips == 3, "logging in, claiming, verifying"
    assert stat.S_IMODE(there.stat().st_mode) == stat.S_IMODE((there / "snapshots").stat().st_mode) == 0o700
    assert (there / ".gitignore").read_text() == "*\n"
    assert inside(there) == {made.hash}
    assert len(list((there / "snapshots" / ".verified").iterdir())) == 1


def test_what_is_there_costs_one_round_trip_and_no_rsync(
    host: SshHost, code: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sync_repository(there, root=code, host=host)
    os.utime(first.path, (0, 0))
    no_rsync(host, monkeypatch)
    before = host.round_trips
    assert sync_repository(there, root=code, host=host) == first
    assert host.round_trips == before + 1
    assert Path(first.path).stat().st_mtime > time.time() - 60, "clean can see that it was used"


def test_the_next_snapshot_shares_the_files_that_are_the_same(host: SshHost, code: Path, there: Path) -> None:
    first = Path(sync_repository(there, root=code, host=host).path)
    (code / "train.py").write_text("lr = 2\n")
    (code / "new.py").touch()
    (code / "empty").unlink()
    made = sync_repository(there, root=code, host=host)
    second = Path(made.path)
    assert_exact(made, code)
    shared = {name for name in names_in(second) if not (second / name).is_symlink()} - {"train.py", "new.py"}
    assert all((second / name).lstat().st_ino == (first / name).lstat().st_ino for name in shared)
    assert (second / "train.py").stat().st_ino != (first / "train.py").stat().st_ino
    assert (first / "train.py").read_text() == "lr = 1\n"
    # Links were added to the first's files: it is looked at once more, and is whole.
    (code / "train.py").write_text("lr = 1\n")
    (code / "new.py").unlink()
    (code / "empty").touch()
    assert sync_repository(there, root=code, host=host).path == str(first)


def test_an_edit_that_keeps_size_and_time_is_not_missed(host: SshHost, code: Path, there: Path) -> None:
    sync_repository(there, root=code, host=host)
    first = next((there / "snapshots").glob("[0-9a-f]*"))
    seen = (code / "train.py").stat()
    (code / "train.py").write_text("lr = 2\n")
    os.utime(code / "train.py", ns=(seen.st_atime_ns, seen.st_mtime_ns))
    made = sync_repository(there, root=code, host=host)
    assert (Path(made.path) / "train.py").read_text() == "lr = 2\n"
    assert_exact(made, code)
    assert (Path(made.path) / "mode-644").stat().st_ino == (first / "mode-644").stat().st_ino
    assert (first / "train.py").read_text() == "lr = 1\n"


def rewritten(path: Path) -> None:
    seen = path.stat()
    path.write_text("lr = 9\n")
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def a_folder_now(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "in the way").touch()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "written to": lambda path: path.write_text("spoilt, and longer"),
    "written to, size and time as before": rewritten,
    "removed": lambda path: path.unlink(),
    "made executable": lambda path: path.chmod(0o755),
    "a folder": a_folder_now,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_snapshot_is_put_right_and_what_trials_made_stays(
    how: str, host: SshHost, code: Path, there: Path
) -> None:
    made = sync_repository(there, root=code, host=host)
    snapshot = Path(made.path)
    (snapshot / "__pycache__").mkdir()
    (snapshot / "__pycache__" / "output").write_text("a trial's")
    DAMAGE[how](snapshot / "train.py")
    again = sync_repository(there, root=code, host=host)
    assert again == made
    assert (snapshot / "__pycache__" / "output").read_text() == "a trial's"
    shutil.rmtree(snapshot / "__pycache__")
    assert_exact(again, code)
    assert inside(there) == {made.hash}
    sync_repository(there, root=code, host=host)
    assert_exact(again, code)


def test_what_trials_make_beside_the_code_costs_nothing(
    host: SshHost, code: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = sync_repository(there, root=code, host=host)
    (Path(made.path) / "pkg" / "__pycache__").mkdir()
    (Path(made.path) / "pkg" / "__pycache__" / "x.pyc").touch()
    no_rsync(host, monkeypatch)
    before = host.round_trips
    sync_repository(there, root=code, host=host)
    assert host.round_trips == before + 1
    assert (Path(made.path) / "pkg" / "__pycache__" / "x.pyc").exists()


def test_a_file_that_a_trial_has_changed_is_not_linked(host: SshHost, code: Path, there: Path) -> None:
    first = Path(sync_repository(there, root=code, host=host).path)
    rewritten(first / "train.py")
    (code / "new.py").touch()
    made = sync_repository(there, root=code, host=host)
    assert_exact(made, code)


@pytest.mark.parametrize(
    "workdir", ["a b/'c'\n\"d\"", "-dash", "~", "~/in my home", "~root/x", ".", "./x/../y/", "$(touch oops)", "a:b"]
)
def test_a_path_there_is_resolved_there_and_read_as_it_is(
    workdir: str, host: SshHost, sshd: SshRig, code: Path
) -> None:
    home = sshd.accounts.home(ROOT)
    expected = home / workdir.removeprefix("~root/").removeprefix("~/").removeprefix("~").replace("./x/../y/", "y")
    expected = home if workdir == "." else expected
    before = set(home.iterdir())
    try:
        made = sync_repository(workdir, root=code, host=host)
        assert made.path == f"{expected}/snapshots/{made.hash}"
        assert_exact(made, code)
        assert sync_repository(workdir, root=code, host=host) == made
        assert not (home / "oops").exists()
    finally:
        for path in set(home.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_destination_is_found_as_ssh_config_says(
    sshd: SshRig, code: Path, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh = tmp_path / "home" / ".ssh"
    ssh.mkdir(parents=True)
    lines = ("Host rig", f"HostName {sshd.host}", f"Port {sshd.port}", "User root", f"IdentityFile {sshd.key}")
    (ssh / "config").write_text("\n".join(lines))
    shutil.copy(sshd.known_hosts, ssh / "known_hosts")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    try:
        assert_exact(sync_repository(f"rig:{there}", root=code), code)
        made = sync_repository("ada@rig:work", root=code)
        assert made.path == f"{sshd.accounts.home(ADA)}/work/snapshots/{made.hash}"
        assert Path(made.path).stat().st_uid == ADA.uid
    finally:
        close_all()
        shutil.rmtree(sshd.accounts.home(ADA) / "work", ignore_errors=True)


def test_two_clients_at_once_both_end_well(sshd: SshRig, code: Path, there: Path) -> None:
    ready = threading.Barrier(4)
    ended: list[Snapshot | BaseException] = []

    def client() -> None:
        host = SshHost(login_of(sshd))
        try:
            host.script(":")
            ready.wait(30)
            ended.append(sync_repository(there, root=code, host=host))
        except BaseException as error:  # noqa: BLE001 - shown below
            ended.append(error)
        finally:
            host.close()

    clients = [threading.Thread(target=client) for _ in range(4)]
    for each in clients:
        each.start()
    for each in clients:
        each.join(120)
    assert len({str(each) for each in ended}) == 1
    assert isinstance(ended[0], Snapshot)
    assert_exact(ended[0], code)
    assert inside(there) == {ended[0].hash}


def test_a_sync_waits_for_whoever_removes_snapshots(host: SshHost, code: Path, there: Path) -> None:
    made = sync_repository(there, root=code, host=host)
    with snapshots_locked(there / "snapshots"):
        waiting = threading.Thread(target=sync_repository, args=(there,), kwargs={"root": code, "host": host})
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive()
        shutil.rmtree(made.path)
    waiting.join(30)
    assert not waiting.is_alive()
    assert_exact(made, code)


CLIENT = """
import sys
from nexa_infra.hosts.login import Login
from nexa_infra.hosts.ssh import SshHost
from nexa_infra.operations.sync import snapshots_locked, sync_repository
there, root, host, port, key, known = sys.argv[1:]
sync_repository(there, root=root, host=SshHost(Login(host, "root", int(port), key, known)))
"""


def test_a_client_that_is_killed_while_it_copies_leaves_nothing_under_its_final_name(
    host: SshHost, sshd: SshRig, code: Path, there: Path
) -> None:
    (code / "large").write_bytes(os.urandom(64 * 2**20))
    login = [sshd.host, str(sshd.port), str(sshd.key), str(sshd.known_hosts)]
    argv = [sys.executable, "-c", CLIENT, str(there), str(code), *login]
    with subprocess.Popen(argv, cwd=ROOT_FOLDER, env={**os.environ, "PYTHONPATH": str(ROOT_FOLDER)}) as client:
        deadline = time.monotonic() + 60
        while not any(path.name == "large" for path in there.glob("snapshots/.staging-*/large")):
            assert client.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        client.send_signal(signal.SIGKILL)
    (left,) = inside(there)
    assert left.startswith(".staging-")
    made = sync_repository(there, root=code, host=host)
    assert_exact(made, code)
    assert inside(there) == {made.hash, left}, "it may be another client's, and busy"
    # A day later it can be nobody's any more.
    os.utime(there / "snapshots" / ".verified" / left.removeprefix(".staging-"), (time.time() - 90_000,) * 2)
    (code / "train.py").write_text("lr = 3\n")
    other = sync_repository(there, root=code, host=host)
    assert inside(there) == {made.hash, other.hash}
    assert {path.name for path in (there / "snapshots" / ".verified").iterdir()} == {made.hash, other.hash}


def test_a_copy_that_fails_leaves_nothing(
    host: SshHost, code: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = host.rsync

    def cut(*arguments: Any, **more: Any) -> None:
        copy(*arguments, **more)
        (next(there.glob("snapshots/.staging-*")) / "pkg").chmod(0o500)
        raise HostError("rsync lost the other side")

    monkeypatch.setattr(host, "rsync", cut)
    with pytest.raises(HostError, match="lost the other side"):
        sync_repository(there, root=code, host=host)
    assert inside(there) == set()
    assert not list((there / "snapshots" / ".verified").iterdir())


def test_nothing_beside_the_snapshots_is_touched(
    host: SshHost, code: Path, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    for folder in (outside, there, there / "snapshots", there / "snapshots" / ".staging-mine", there / "runs"):
        folder.mkdir(parents=True)
        (folder / "sentinel").write_text("mine")
    verified = there / "snapshots" / ".verified"
    verified.mkdir()
    for number, target in enumerate((str(outside), "..", "../runs")):
        token = f"{number:016x}"
        (there / "snapshots" / f".staging-{token}").symlink_to(target)
        (verified / token).touch()
        os.utime(verified / token, (0, 0))
    (verified / "..x").touch()
    os.utime(verified / "..x", (0, 0))
    sync_repository(there, root=code, host=host)
    (code / "train.py").write_text("lr = 2\n")
    sync_repository(there, root=code, host=host)
    (code / "train.py").write_text("lr = 3\n")
    monkeypatch.setattr(host, "rsync", lambda *_, **__: (_ for _ in ()).throw(HostError("it failed")))
    with pytest.raises(HostError, match="it failed"):
        sync_repository(there, root=code, host=host)
    for folder in (outside, there, there / "snapshots", there / "snapshots" / ".staging-mine", there / "runs"):
        assert (folder / "sentinel").read_text() == "mine"


def test_a_link_in_the_place_of_a_snapshot_is_not_followed(
    host: SshHost, code: Path, there: Path, tmp_path: Path
) -> None:
    name = sync_repository(there, root=code, host=host).hash
    (there / "snapshots" / name).rename(tmp_path / "moved")
    (tmp_path / "moved" / "train.py").write_text("mine")
    (there / "snapshots" / name).symlink_to(tmp_path / "moved")
    with pytest.raises(SyncError, match=f"{name} is in the way: it is no folder"):
        sync_repository(there, root=code, host=host)
    assert (tmp_path / "moved" / "train.py").read_text() == "mine"


@pytest.mark.parametrize(
    ("workdir", "words"),
    [
        ("/etc/nexa", "mkdir: cannot create directory '/etc/nexa': Permission denied"),
        ("/usr", "mkdir: cannot create directory .*: Permission denied"),
        ("file/below", "mkdir: cannot create directory .*: Not a directory"),
        ("file", "mkdir: cannot create directory .*: File exists"),
        ("~nobody-of-this-name/x", "there is no user ~nobody-of-this-name"),
        ("/proc/nexa", "mkdir: cannot create directory .*: No such file or directory"),
    ],
)
def test_a_workdir_that_cannot_be_used_is_one_clear_error(
    workdir: str, words: str, ada: SshHost, sshd: SshRig, code: Path
) -> None:
    (sshd.accounts.home(ADA) / "file").touch()
    before = set(sshd.accounts.home(ADA).iterdir())
    with pytest.raises(SyncError, match=f"cannot take the code: {words}") as told:
        sync_repository(workdir, root=code, host=ada)
    assert str(told.value).startswith(f"{workdir} on {ada.name} ")
    assert "\n" not in str(told.value)
    assert set(sshd.accounts.home(ADA).iterdir()) == before


def test_a_full_disk_is_one_clear_error(host: SshHost, code: Path, there: Path) -> None:
    (code / "large").write_bytes(os.urandom(3 * 2**20))
    there.mkdir(parents=True)
    # It is mounted where only the host sees it.
    host.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(there)]).check()
    try:
        with pytest.raises(HostError, match="No space left on device"):
            sync_repository(there, root=code, host=host)
        assert host.run(["ls", "-A", f"{there}/snapshots"]).stdout == ".verified\n"
    finally:
        host.run(["umount", str(there)]).check()


def test_a_host_without_rsync_is_one_clear_error(ada: SshHost, sshd: SshRig, code: Path, tmp_path: Path) -> None:
    bashrc = sshd.accounts.home(ADA) / ".bashrc"
    before, bare = bashrc.read_text(), sshd.accounts.home(ADA) / "bin"
    bare.mkdir()
    for name in ("sh", "mkdir", "ls", "cat"):
        (bare / name).symlink_to(f"/bin/{name}")
    bashrc.write_text(f"PATH={bare}\n")
    try:
        with pytest.raises(HostError, match=f"rsync is not installed on {ada.name}: ask its administrators"):
            sync_repository("work", root=code, host=ada)
        assert not (sshd.accounts.home(ADA) / "work").exists()
    finally:
        bashrc.write_text(before)
        shutil.rmtree(bare)


def test_what_is_wrong_here_is_said_before_anybody_logs_in(
    host: SshHost, sshd: SshRig, code: Path, there: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SyncError, match="there is no code"):
        sync_repository(there, root=tmp_path / "empty", host=host)
    (code / "large").write_bytes(b"x" * (2 * 2**20))
    with pytest.raises(SyncError, match=r"over sync.max_mib.*large \(2 MiB\)"):
        sync_repository(there, root=code, host=host, rules=SyncRules(max_mib=1))
    assert sshd.logins() == 0
    assert not there.exists()


def test_a_host_that_does_not_answer_is_one_clear_error(sshd: SshRig, code: Path, there: Path) -> None:
    sshd.stop()
    with pytest.raises(HostError, match="refuses connections"):
        sync_repository(there, root=code, host=SshHost(login_of(sshd)))


def test_a_read_only_folder_of_the_code_travels_for_a_plain_user(ada: SshHost, sshd: SshRig, code: Path) -> None:
    (code / "pkg" / "deep").chmod(0o555)
    try:
        made = sync_repository("work", root=code, host=ada)
        (code / "train.py").write_text("lr = 2\n")
        again = sync_repository("work", root=code, host=ada)
        assert_exact(again, code)
        assert stat.S_IMODE((Path(made.path) / "pkg" / "deep").stat().st_mode) == 0o555
    finally:
        shutil.rmtree(sshd.accounts.home(ADA) / "work", ignore_errors=True)
