"""A host over SSH, with a real sshd: what is sent and what comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nexa_infra.errors import HostError
from nexa_infra.hosts import connections, ssh
from nexa_infra.hosts.base import ConnectionLostError
from nexa_infra.hosts.ssh import SshHost
from nexa_infra.spec.cluster import Cluster
from tests.rig.accounts import ADA, CSH, NOISY, Account
from tests.rig.proxy import login_to, reached, wait
from tests.rig.ssh import SshRig

WORDS = [
    "two words",
    "it's",
    'a "quote"',
    "new\nline",
    "$(touch /tmp/nexa-injected)",
    "`id`",
    "-rf",
    "*",
    "",
    "\\",
    "ü\udcff",
]


@pytest.fixture
def host(sshd: SshRig) -> Iterator[SshHost]:
    with reached(sshd) as host:
        yield host


def processes(words: str) -> list[int]:
    """The processes whose command line begins so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().decode(errors="replace").replace("\0", " ").startswith(words):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def test_one_login_serves_commands_an_rsync_and_a_stream(host: SshHost, sshd: SshRig, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\n")
    stream = host.stream(["tail", "-n", "+1", "-f", str(log)], every=0.1)
    assert next(piece for piece in stream if piece) == b"one\n"
    for number in range(20):
        assert host.run(["echo", str(number)]).stdout == f"{number}\n"
    host.rsync(f"{log}", host.there(f"{tmp_path}/copy"))
    assert host.script(f"cat '{tmp_path}/copy'").stdout == "one\n"
    with log.open("a") as more:
        more.write("two\n")
    assert next(piece for piece in stream if piece) == b"two\n"
    stream.close()
    assert sshd.logins() == 1
    assert host.sessions <= 3


def test_words_arrive_as_they_are(host: SshHost) -> None:
    done = host.run(["printf", "%s\\0", *WORDS])
    assert done.stdout.split("\0")[:-1] == WORDS
    assert not Path("/tmp/nexa-injected").exists()
    with pytest.raises(ValueError, match="null byte"):
        host.run(["echo", "a\0b"])


def test_bytes_come_and_go_exactly(host: SshHost) -> None:
    everything = "".join(map(chr, range(128))) + "\udc80\udcfe\udcff\r\nü"
    assert host.run(["cat"], stdin=everything).stdout == everything
    assert host.run(["sh", "-c", "cat >&2"], stdin=everything).stderr == everything


def test_large_answers_and_large_inputs(host: SshHost) -> None:
    done = host.script("head -c 10000000 /dev/zero | tr '\\0' x; echo; seq 100000 >&2")
    assert done.stdout == "x" * 10_000_000 + "\n"
    assert done.stderr.splitlines() == [str(number) for number in range(1, 100_001)]
    text = "0123456789abcdef" * 200_000
    assert (
        host.run(["sha256sum"], stdin=text).stdout
        == host.script("printf 0123456789abcdef%.0s $(seq 200000) | sha256sum").stdout
    )


def test_a_script_may_be_longer_than_any_buffer(host: SshHost) -> None:
    lines = [f"test '{number:04}' = {number:04} || exit 9" for number in range(6000)]
    done = host.script("\n".join(["cat", *lines, "exit 5"]))  # cat: the script's input is not the script
    assert (done.returncode, done.stdout, done.stderr) == (5, "", "")


def test_exit_codes_and_both_streams_are_told_apart(host: SshHost) -> None:
    done = host.script("echo out; echo err >&2; printf tail; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\ntail", "err\n")
    with pytest.raises(HostError, match="sh ended with 3: err"):
        done.check()
    assert host.run(["sh", "-c", "exit 255"]).returncode == 255
    assert host.run(["sh", "-c", "kill -9 $$"]).returncode == 128 + 9
    assert host.run(["pwd"], cwd=Path("/usr")).stdout == "/usr\n"
    assert host.run(["sh", "-c", 'echo "$A"'], env={"A": "b c"}).stdout == "b c\n"


def test_one_script_leaves_nothing_to_the_next(host: SshHost) -> None:
    host.script("cd /usr; A=1; export A; umask 0; set -e; exec 2>/dev/null; trap 'echo bye' EXIT; ulimit -n 64")
    done = host.script("echo $A; false; umask; ulimit -n; pwd; echo said >&2")
    assert done.stdout.splitlines()[:2] == ["", "0022"] and "64" not in done.stdout and "/usr" not in done.stdout
    assert done.stderr == "said\n" and host.sessions == 1


@pytest.mark.parametrize("script", ["echo 'never closed", "if true; then", "cat <<END", "echo ) ; }", "(", "\\"])
def test_a_script_that_is_no_shell_ends_and_spoils_nothing(host: SshHost, script: str) -> None:
    host.script(script, timeout=5)
    assert host.script("echo next").stdout == "next\n"
    assert host.sessions == 1


@pytest.mark.parametrize("script", ["exit 4", "kill -9 $$; exit 4", "(kill -9 $$) & wait; exit 4"])
def test_a_script_that_ends_its_own_shell_has_an_answer(host: SshHost, script: str) -> None:
    assert host.script(script).returncode == 4
    assert host.script("echo next").stdout == "next\n"


@pytest.mark.parametrize("script", ["kill -9 0", "kill -9 $PPID; sleep 5"])
def test_a_script_that_ends_more_than_its_shell_has_none(host: SshHost, script: str) -> None:
    with pytest.raises(ConnectionLostError, match="whether the script was run is not known"):
        host.script(script)
    assert host.script("echo next").stdout == "next\n"


def test_what_stays_in_the_background_is_neither_awaited_nor_heard_by_the_next(host: SshHost, tmp_path: Path) -> None:
    begun = time.monotonic()
    done = host.script(f"(sleep 0.6; echo late; echo late >&2; touch {tmp_path}/late) & echo now")
    assert done.stdout == "now\n" and time.monotonic() - begun < 0.6
    done = host.script("sleep 0.9; echo next")
    assert (done.stdout, done.stderr) == ("next\n", "")
    # With its streams elsewhere it goes on.
    host.script(f"(sleep 0.2; touch {tmp_path}/done) >/dev/null 2>&1 &")
    wait((tmp_path / "done").exists)


@pytest.mark.parametrize("user", [CSH, NOISY])
def test_the_login_shell_and_what_it_prints_do_not_matter(sshd: SshRig, user: Account, tmp_path: Path) -> None:
    with reached(sshd, user) as host:
        done = host.run(["printf", "%s", "a'b\n!$x"])
        assert (done.stdout, done.stderr) == ("a'b\n!$x", "")
        assert host.script("echo err >&2; exit 3").stderr == "err\n"
        assert b"".join(host.stream(["printf", "x\\ny"])) == b"x\ny"
        (tmp_path / "a").write_text("text")
        host.rsync(f"{tmp_path}/a", host.there(f"{tmp_path}/b c"))
        assert (tmp_path / "b c").read_text() == "text"


def test_a_banner_and_loud_start_up_files_are_no_part_of_an_answer(rig_folder: Path) -> None:
    with SshRig(rig_folder, banner="Authorized use only\n" * 50) as sshd:
        start_up = sshd.accounts.home(ADA) / ".bashrc"
        start_up.write_text(
            "head -c 300000 /dev/zero | tr '\\0' '#'; seq 99999 >&2; trap 'echo bye; echo bye >&2' EXIT\n"
        )
        with reached(sshd, ADA) as host:
            done = host.script("echo answer")
            assert (done.stdout, done.stderr) == ("answer\n", "")
            host.rsync(host.there(str(start_up)), f"{rig_folder}/copy")
            assert (rig_folder / "copy").read_bytes() == start_up.read_bytes()


def test_threads_share_the_login_and_not_the_answers(host: SshHost, sshd: SshRig) -> None:
    told: dict[int, list[str]] = {}

    def ask(number: int) -> None:
        told[number] = [host.script(f"sleep 0.0{number}; echo {number} {turn}").stdout for turn in range(10)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == {number: [f"{number} {turn}\n" for turn in range(10)] for number in range(4)}
    assert sshd.logins() == 1 and host.sessions <= 4


@pytest.mark.parametrize("argv", [["nexa-no-such"], ["if"], ["A=1", "true"], ["cd", "/"]])
def test_what_is_no_program_there_is_said_to_be_missing(host: SshHost, argv: list[str]) -> None:
    with pytest.raises(HostError, match=f"{argv[0]} is not installed on root@127.0.0.1"):
        host.run(argv)
    with pytest.raises(HostError, match=f"{argv[0]} is not installed"):
        host.run(argv, env={"B": "2"}) if argv[0] != "A=1" else host.run(argv)
    with pytest.raises(HostError, match=f"{argv[0]} is not installed"):
        list(host.stream(argv))
    with pytest.raises(HostError, match="the folder /nexa/none is not there"):
        host.run(["true"], cwd=Path("/nexa/none"))
    # A program may end so by itself.
    assert host.run(["sh", "-c", "exit 127"]).returncode == 127


def test_a_stream_ends_with_its_command_and_says_how(host: SshHost) -> None:
    assert b"".join(
        host.stream(["sh", "-c", "printf 'a\\0b'; sleep 0.1; head -c 3000000 /dev/zero"])
    ) == b"a\0b" + bytes(3_000_000)
    with pytest.raises(HostError, match="tail ended with 1 on .*cannot open '/nexa/none'"):
        list(host.stream(["tail", "-f", "/nexa/none"]))
    with pytest.raises(HostError, match="sh was ended on .* by signal 9"):
        list(host.stream(["sh", "-c", "kill -9 $$"]))
    noise = host.stream(["sh", "-c", "seq 1000000 >&2; echo done"])  # nobody reads it, and it holds nothing up
    assert b"".join(noise) == b"done\n"


def test_a_stream_that_is_left_ends_over_there(host: SshHost, tmp_path: Path) -> None:
    (tmp_path / "left").touch()
    stream = host.stream(["tail", "-f", str(tmp_path / "left")], every=0.05)
    assert next(stream) == b""
    wait(lambda: processes(f"tail -f {tmp_path}/left"))
    stream.close()
    wait(lambda: not processes(f"tail -f {tmp_path}/left"))
    assert host.script("echo next").stdout == "next\n"


def kill_watch(path: Path) -> None:
    """Kill the `cat` that waits for a stream's client to go."""
    (tail,) = processes(f"tail -f {path}")
    shell = int(Path(f"/proc/{tail}/stat").read_text().split()[3])
    for child in Path(f"/proc/{shell}/task/{shell}/children").read_text().split():
        for grandchild in Path(f"/proc/{child}/task/{child}/children").read_text().split():
            os.kill(int(grandchild), 9)


def kill_shell(path: Path) -> None:
    """Kill the shell that has a stream's command for a child, and then the command."""
    (tail,) = processes(f"tail -f {path}")
    os.kill(int(Path(f"/proc/{tail}/stat").read_text().split()[3]), 9)
    os.kill(tail, 9)


@pytest.mark.parametrize("kill", [kill_watch, kill_shell])
def test_a_stream_whose_far_side_is_killed_is_no_end(
    host: SshHost, tmp_path: Path, kill: Callable[[Path], None]
) -> None:
    (tmp_path / "log").touch()
    stream = host.stream(["tail", "-f", str(tmp_path / "log")], every=0.05)
    assert next(stream) == b""
    kill(tmp_path / "log")
    with pytest.raises(HostError, match="tail was ended on .* by signal 15|its shell was killed"):
        list(stream)


CLIENT = """
import sys
from nexa_infra.hosts.login import Login
from nexa_infra.hosts.ssh import SshHost
host = SshHost(Login("127.0.0.1", "root", int(sys.argv[1]), sys.argv[2], sys.argv[3]))
host.script("true")
stream = host.stream(["tail", "-n", "1", "-f", sys.argv[4]])
next(piece for piece in stream if piece)
print("ready", flush=True)
host.script("sleep 3071")
"""


def test_a_client_that_is_killed_leaves_no_shell_and_no_stream(sshd: SshRig, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("line\n")
    argv = [sys.executable, "-c", CLIENT, str(sshd.port), str(sshd.key), str(sshd.known_hosts), str(log)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as client:
        assert client.stdout and client.stdout.readline() == b"ready\n"
        wait(lambda: processes("sleep 3071"))
        (sleep,) = processes("sleep 3071")
        client.kill()
    wait(lambda: not processes(f"tail -n 1 -f {log}"))
    # A script that runs is let to its end: half of it would be worse.
    os.kill(sleep, 15)
    wait(lambda: not processes("sleep 3071"))
    wait(lambda: not [pid for pid in processes("/bin/sh -s") if f" {sshd.port}" in environment(pid)])


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def environment(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_close_leaves_nothing(sshd: SshRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before, open_before = set(threading.enumerate()), descriptors()
    with reached(sshd) as host:
        stream = host.stream(["tail", "-f", "/dev/null"], every=0.05)
        next(stream)
        host.rsync("/etc/hostname", host.there(f"{tmp_path}/a"))
        host.script("true")
        assert set(threading.enumerate()) > before
        host.close()
        assert set(threading.enumerate()) == before
        with pytest.raises(ConnectionLostError):
            list(stream)
        assert host.script("echo again").stdout == "again\n"
    wait(lambda: not processes("tail -f /dev/null") and descriptors() <= open_before)
    assert not list(tmp_path.glob("nexa-ssh-*"))


def test_a_process_has_one_connection_for_a_cluster(sshd: SshRig) -> None:
    login = login_to(sshd)
    cluster = Cluster(
        name="c", workdir="/w", host=login.host, user=login.user, port=login.port, key_file=login.key_file,
        known_hosts=login.known_hosts,
    )  # fmt: skip
    with connections.kept_open(cluster), connections.kept_open(cluster):
        host = connections.host_of(cluster)
        assert host is connections.ssh_host(login) and host.remote
        host.script("true")
        with connections.kept_open(cluster):
            pass
        assert connections.host_of(cluster) is host
        assert host.script("echo open").stdout == "open\n"
    assert sshd.logins() == 1
    assert connections.ssh_host(login) is not host
    connections.close_all()


def test_a_server_that_allows_one_session_is_enough(rig_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "BACKOFF", (0.1, 0.2))
    with SshRig(rig_folder, settings={"MaxSessions": "1"}) as sshd, reached(sshd) as host:
        host.script("true")
        host.rsync("/etc/hostname", host.there(f"{rig_folder}/a"))
        assert host.script("echo one").stdout == "one\n"
        stream = host.stream(["tail", "-f", "/dev/null"], every=0.05)
        next(stream)
        with pytest.raises(HostError, match="no more sessions on one connection.*MaxSessions"):
            host.script("true")
        assert next(stream) == b""
        stream.close()
        assert host.script("echo two").stdout == "two\n"
        assert sshd.logins() == 1
