"""A host over SSH on bad days: cuts, stalls, restarts; copies that fail; and that none of it passes for an answer."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexa_infra.errors import HostError
from nexa_infra.hosts import line, login, ssh
from nexa_infra.hosts.base import ConnectionLostError
from nexa_infra.hosts.ssh import SshHost
from tests.rig.accounts import ADA
from tests.rig.proxy import Proxy, reached, through_proxy, wait
from tests.rig.ssh import SshRig

# What is sent before a cut is noticed has no answer, seconds.
NOTICED = 0.3


@pytest.fixture
def behind(sshd: SshRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SshHost, Proxy]]:
    """A host behind a proxy, whose patience is short."""
    monkeypatch.setattr(ssh, "BACKOFF", (0.1, 0.2, 0.4))
    monkeypatch.setattr(line, "PULSE", 0.6)
    monkeypatch.setattr(line, "ANSWER_SECONDS", 0.4)
    with through_proxy(sshd, tmp_path) as (host, proxy):
        yield host, proxy


def test_a_connection_that_is_cut_while_a_script_runs_is_no_answer(sshd: SshRig, tmp_path: Path) -> None:
    with reached(sshd) as host:
        host.script("true")
        threading.Timer(0.3, sshd.cut).start()
        with pytest.raises(ConnectionLostError, match="cut before the answer was whole.*is not known"):
            host.script(f"echo half; touch {tmp_path}/begun; sleep 1; touch {tmp_path}/ended; echo rest")
        assert (tmp_path / "begun").exists()
        assert host.script("echo again").stdout == "again\n"
        assert sshd.logins() == 2


def test_half_an_answer_is_none(behind: tuple[SshHost, Proxy]) -> None:
    host, proxy = behind
    host.script("true")
    threading.Timer(0.3, proxy.cut).start()
    with pytest.raises(ConnectionLostError):
        host.script("yes | head -c 3000000; sleep 1")


@pytest.mark.parametrize("count", [1, 40_000, 150_000])
def test_a_script_that_is_cut_on_its_way_has_run_nothing(
    behind: tuple[SshHost, Proxy], tmp_path: Path, count: int
) -> None:
    host, proxy = behind
    host.script("true")
    proxy.cut_after(count)
    with pytest.raises(ConnectionLostError):
        host.script(f"touch {tmp_path}/ran\n" + "true\n" * 50_000)
    assert host.script("sleep 0.3; echo again").stdout == "again\n"
    assert not (tmp_path / "ran").exists()


def test_a_stalled_connection_is_given_up_in_time_and_the_next_call_works(behind: tuple[SshHost, Proxy]) -> None:
    host, proxy = behind
    host.script("true")
    proxy.stall()
    begun = time.monotonic()
    with pytest.raises(ConnectionLostError, match="has not answered for 0.3 s"):
        host.script("true", timeout=0.3)
    assert time.monotonic() - begun < 1.0
    threading.Timer(0.1, proxy.cut).start()  # who connects anew gets through
    assert host.script("echo again").stdout == "again\n"


def test_a_silent_line_is_asked_whether_it_lives_long_before_patience_ends(behind: tuple[SshHost, Proxy]) -> None:
    host, proxy = behind
    assert host.script("sleep 1; echo slow").stdout == "slow\n"  # it lives, and so it is waited for
    threading.Timer(0.2, proxy.stall).start()
    begun = time.monotonic()
    with pytest.raises(ConnectionLostError, match="no sign of life"):
        host.script("sleep 3; echo never", timeout=60)
    assert time.monotonic() - begun < 3.0
    stream = host_after(proxy, host).stream(["tail", "-f", "/dev/null"], every=0.1)
    next(stream)
    proxy.stall()
    with pytest.raises(ConnectionLostError):
        list(stream)


def host_after(proxy: Proxy, host: SshHost) -> SshHost:
    """Let new connections through, and reach the host by one."""
    proxy.cut()
    time.sleep(NOTICED)
    assert host.script("echo again").stdout == "again\n"
    return host


def test_a_connection_that_died_in_its_sleep_is_replaced_before_anything_is_sent(
    behind: tuple[SshHost, Proxy], sshd: SshRig
) -> None:
    host, proxy = behind
    host.script("true")
    proxy.stall()
    time.sleep(0.7)
    threading.Timer(0.6, proxy.cut).start()
    assert host.script("echo again").stdout == "again\n"
    assert sshd.logins() == 2


def test_an_upload_into_a_stalled_connection_ends(
    behind: tuple[SshHost, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(login, "UNACKNOWLEDGED_SECONDS", 1.0)
    monkeypatch.setattr(line, "PULSE", 5.0)
    host, proxy = behind
    host.script("true")
    proxy.stall()
    with pytest.raises(ConnectionLostError):
        host.run(["cat"], stdin="x" * 20_000_000, timeout=3)


def test_every_script_is_awaited_on_a_slow_line(behind: tuple[SshHost, Proxy]) -> None:
    host, proxy = behind
    proxy.delay = 0.05
    assert [host.script(f"echo {number}").stdout for number in range(3)] == ["0\n", "1\n", "2\n"]
    assert host.sessions == 1


def test_a_server_that_comes_back_is_reached_again(
    sshd: SshRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "BACKOFF", (0.1, 0.2, 0.4, 0.8, 1.6))
    with reached(sshd) as host:
        host.script("true")
        sshd.kill()
        time.sleep(NOTICED)
        restart = threading.Timer(0.5, sshd.start)
        restart.start()
        assert host.script("echo back").stdout == "back\n"
        restart.join()
        sshd.kill()
        time.sleep(NOTICED)
        monkeypatch.setattr(ssh, "BACKOFF", (0.1, 0.2))
        begun = time.monotonic()
        with pytest.raises(HostError, match="refuses connections: check the port .*whether its sshd runs") as told:
            host.script(f"touch {tmp_path}/ran")
        assert not isinstance(told.value, ConnectionLostError) and time.monotonic() - begun < 3.0
        with pytest.raises(HostError, match="refuses connections"):
            host.rsync("/etc/hostname", host.there(f"{tmp_path}/a"))
        with pytest.raises(HostError, match="refuses connections"):
            next(host.stream(["tail", "-f", "/dev/null"]))
        sshd.start()
        assert host.script("echo back").stdout == "back\n"
        assert not (tmp_path / "ran").exists()


def test_a_frozen_server_is_not_waited_for_for_ever(sshd: SshRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "CONNECT_SECONDS", 1.0)
    with reached(sshd) as host:
        sshd.sshd.send(signal.SIGSTOP)
        with pytest.raises(HostError, match="does not answer within 1 s"):
            host.script("true")
        sshd.sshd.send(signal.SIGCONT)
        assert host.script("echo up").stdout == "up\n"


def test_a_login_shell_that_hangs_or_refuses_is_named(rig_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "LOGIN_SECONDS", 2.0)
    with SshRig(rig_folder) as sshd, reached(sshd, ADA) as host:
        start_up = sshd.accounts.home(ADA) / ".bashrc"
        start_up.write_text("sleep 30\n")
        with pytest.raises(HostError, match="login shell .* has not started for 2 s: look at its start-up files"):
            host.script(f"touch {rig_folder}/ran")
        start_up.write_text("echo 'This account is currently not available.'; exit 1\n")
        with pytest.raises(HostError, match="starts no shell .*This account is currently not available"):
            host.script(f"touch {rig_folder}/ran")
        start_up.write_text("")
        assert host.script("echo up").stdout == "up\n"
        # On a machine so busy that a sign of life is late, the connection is made once more.
        assert not (rig_folder / "ran").exists() and sshd.logins() <= 2


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of 40 MB to copy."""
    folder = tmp_path / "tree"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}").write_bytes(os.urandom(2_000_000))
    return folder


@pytest.mark.parametrize("upward", [True, False])
def test_a_copy_over_a_connection_that_is_cut_fails_and_can_be_repeated(
    behind: tuple[SshHost, Proxy], tree: Path, tmp_path: Path, upward: bool
) -> None:
    host, proxy = behind
    host.script("true")
    proxy.delay = 0.005
    copy = f"{tmp_path}/copy/"
    ends = (f"{tree}/", host.there(copy)) if upward else (host.there(f"{tree}/"), copy)
    threading.Timer(0.4, proxy.cut).start()
    with pytest.raises(ConnectionLostError, match="connection to .* was cut while rsync copied"):
        host.rsync(*ends, options=["-a"])
    proxy.delay = 0.0
    host.rsync(*ends, options=["-a"])
    assert all((tmp_path / "copy" / path.name).read_bytes() == path.read_bytes() for path in tree.iterdir())


def test_a_copy_over_a_connection_that_stalls_ends(
    behind: tuple[SshHost, Proxy], tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, proxy = behind
    host.script("true")
    proxy.delay = 0.005
    threading.Timer(0.3, proxy.stall).start()
    with pytest.raises(ConnectionLostError, match="no sign of life"):
        host.rsync(host.there(f"{tree}/"), f"{tmp_path}/copy/", options=["-a"])


def test_copies_go_both_ways_with_any_name_and_scripts_after(sshd: SshRig, tree: Path, tmp_path: Path) -> None:
    strange = tmp_path / 'it\'s a "new\nplace" $(x) `y` *'
    with reached(sshd) as host:
        host.rsync(f"{tree}/", host.there(f"{strange}/"), options=["-a"])
        host.rsync(host.there(f"{strange}/"), f"{tmp_path}/back/", options=["-a", "--files-from=-"], stdin="1\n7\n")
        assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["1", "7"]
        assert (tmp_path / "back" / "7").read_bytes() == (tree / "7").read_bytes()
        host.rsync(f"{tree}/0", host.there("nexa-relative"))
        assert host.script("cmp nexa-relative " + f"'{tree}/0' && rm nexa-relative").returncode == 0
        assert sshd.logins() == 1


@pytest.mark.parametrize("temporary", ["a b'c\"d", "x" * 200])
def test_where_temporary_files_lie_and_how_python_is_called_do_not_matter(
    sshd: SshRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: str
) -> None:
    folder = tmp_path / temporary
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    python = folder / "py'th\"on 3"
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    with reached(sshd) as host:
        host.rsync("/etc/hostname", host.there(f"{tmp_path}/copy"))
    assert (tmp_path / "copy").read_bytes() == Path("/etc/hostname").read_bytes()
    assert list(folder.iterdir()) == [python]


def test_what_rsync_could_not_copy_is_told_in_its_words(rig_folder: Path) -> None:
    with SshRig(rig_folder) as sshd, reached(sshd, ADA) as host:
        home = sshd.accounts.home(ADA)
        host.script("mkdir d; echo a >d/a; echo b >d/b; chmod 0 d/b")
        with pytest.raises(
            HostError, match=r"rsync could not copy everything: .*d/b.*Permission denied.*\(exit code 23\)"
        ) as told:
            host.rsync(host.there(f"{home}/d/"), f"{rig_folder}/out/", options=["-a"])
        assert "rsync error" not in str(told.value) and "\n" not in str(told.value)
        assert (rig_folder / "out" / "a").read_text() == "a\n"
        with pytest.raises(HostError, match="rsync .*/nexa.*No such file"):
            host.rsync(host.there("/nexa/none"), str(rig_folder))
        with pytest.raises(HostError, match="rsync .*--nexa-none: unknown option"):
            host.rsync("/etc/hostname", host.there(f"{home}/x"), options=["--nexa-none"])
        assert host.script("echo on").stdout == "on\n" and sshd.logins() == 1


def test_without_rsync_on_either_side_the_error_says_where(rig_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = rig_folder / "bin"
    bare.mkdir()
    for name in ("sh", "sleep"):
        (bare / name).symlink_to(str(shutil.which(name)))
    with SshRig(rig_folder, environment={"PATH": str(bare)}) as sshd, reached(sshd) as host:
        with pytest.raises(HostError, match="rsync is not installed on root@127.0.0.1:.*ask its administrators"):
            host.rsync("/etc/hostname", host.there("/tmp/nexa-none"))
        assert host.script("echo on").stdout == "on\n"
        monkeypatch.setenv("PATH", str(bare))
        with pytest.raises(HostError, match="rsync is not installed here: apt-get install rsync"):
            host.rsync("/etc/hostname", host.there("/tmp/nexa-none"))


def test_an_rsync_that_is_killed_leaves_nothing(sshd: SshRig, tree: Path, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with reached(sshd) as host:

        def kill() -> None:
            wait(lambda: children("rsync"), within=5)
            os.kill(children("rsync")[0], signal.SIGKILL)

        killer = threading.Timer(0.05, kill)
        killer.start()
        with pytest.raises(HostError, match="rsync ended with -9"):
            host.rsync(f"{tree}/", host.there(f"{tmp_path}/copy/"), options=["-a", "--bwlimit=1000"])
        killer.join()
        assert host.script("echo on").stdout == "on\n"
    wait(lambda: set(threading.enumerate()) == before)


def children(name: str) -> list[int]:
    """The children of this process that are called so."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            try:
                if Path(f"/proc/{child}/comm").read_text().strip() == name:
                    found.append(int(child))
            except OSError:
                continue
    return found
