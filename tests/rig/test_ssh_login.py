"""Logging in to a real sshd: keys, agents, certificates, jump hosts, second factors; one clear error a failure."""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.errors import HostError
from nexa_infra.hosts import login
from nexa_infra.hosts.base import UnreachableError
from nexa_infra.hosts.login import Login, remember_passphrase
from nexa_infra.hosts.ssh import SshHost
from tests.rig.accounts import ADA, CODE
from tests.rig.daemons import free_ports
from tests.rig.proxy import Proxy, login_to, reached
from tests.rig.ssh import SshRig

SECRET = "correct-horse-battery"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the agent nor the keys nor the passphrases of anybody else."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(login, "_passphrases", {})


def refusal(sshd: SshRig, **changes: Any) -> str:
    """The one error with which a login ends; it is told at once, and leaves no connection."""
    begun = time.monotonic()
    with reached(sshd, **changes) as host, pytest.raises(HostError) as told:
        host.script("true")
    assert time.monotonic() - begun < 5.0
    return str(told.value)


def test_each_way_not_to_get_in_has_its_own_words(sshd: SshRig, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    key = sshd.key
    empty, junk = tmp_path / "empty", tmp_path / "junk"
    empty.touch()
    junk.write_text("no key\n")
    wrong = str(sshd.new_key("wrong", authorized=False))
    here, jump = f"root@127.0.0.1:{sshd.port}", f"root@127.0.0.1:{port}"
    by_hand = f"`ssh -p {sshd.port} -i {key} -o UserKnownHostsFile={empty} root@127.0.0.1`"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"port": port}, rf"{jump} refuses connections: check the port \({port}\)"),
        ({"host": "nexa.invalid"}, "there is no host called nexa.invalid: check its name, and the VPN"),
        ({"known_hosts": str(empty)}, f"the host key of {here} is not known in {empty}: log in once by {by_hand}"),
        ({"known_hosts": str(tmp_path / "none")}, r"known_hosts file .*/none cannot be read \(No such file"),
        ({"key_file": wrong}, f"does not let root in with the key {wrong}: check user and .*set keyboard_interactive"),
        ({"key_file": None}, "does not let root in with the keys of the agent and of ~/.ssh"),
        ({"user": "nobody-here"}, "does not let nobody-here in"),
        ({"key_file": "~/none"}, "the key ~/none for root@.* is not there: check key_file"),
        ({"key_file": str(junk)}, "the key .*/junk for .* is no private key that can be used here"),
        ({"key_file": f"{key}.pub"}, "is no private key"),
        ({"jump_host": jump}, f"{jump} refuses connections"),
        ({"jump_host": here, "port": port}, f"{jump} cannot be reached through its jump host"),
    ]
    for changes, words in cases:
        said = refusal(sshd, **changes)
        assert re.search(words, said), said
        assert "\n" not in said and "Traceback" not in said
    assert isinstance(UnreachableError(""), HostError)


def test_a_changed_host_key_is_refused(rig_folder: Path) -> None:
    with SshRig(rig_folder) as sshd, reached(sshd) as host:
        host.script("true")
        sshd.change_host_key()
        with pytest.raises(HostError, match="is not the one in .*somebody may be in between.*ssh-keygen -R") as told:
            host.script("true")
        assert f"ssh-keygen -R '[127.0.0.1]:{sshd.port}' -f {sshd.known_hosts}" in str(told.value)
        sshd.trust_host_key()
        assert host.script("echo known").stdout == "known\n"


def test_what_never_answers_is_given_up(sshd: SshRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "CONNECT_SECONDS", 1.0)
    with Proxy(sshd.port) as proxy:
        proxy.stall()
        assert "does not answer within 1 s" in refusal(sshd, port=proxy.port)
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=lambda: other.accept()[0].sendall(b"220 mail\r\n" * 200), daemon=True).start()
        assert "check that an sshd listens on port" in refusal(sshd, port=other.getsockname()[1])
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as queue:
        for _ in range(2):  # who comes after these is not answered
            waiting = queue.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        assert "does not answer within 1 s: check host and port, and the VPN" in refusal(
            sshd, port=full.getsockname()[1]
        )


@pytest.mark.parametrize("kind", ["ed25519", "rsa", "ecdsa", "old"])
def test_a_locked_key(sshd: SshRig, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = tmp_path / kind
    form = ["-m", "PEM", "-t", "rsa"] if kind == "old" else ["-t", kind]
    subprocess.run(["ssh-keygen", "-q", *form, "-N", SECRET, "-f", str(key)], check=True)
    with (sshd.folder / "server" / "authorized_keys").open("a") as stream:
        stream.write(key.with_suffix(".pub").read_text())

    said = [refusal(sshd, key_file=str(key))]
    assert f"the key {key} for root@127.0.0.1:{sshd.port} has a passphrase" in said[0]
    assert f"`ssh-add {key}`" in said[0] and "save the passphrase in the cluster's block" in said[0]
    remember_passphrase(str(key), f"not-{SECRET}")
    said.append(refusal(sshd, key_file=str(key)))
    assert "is not opened by the passphrase that the cluster's block holds" in said[1]

    remember_passphrase(f"~/{kind}", SECRET)  # the home is tmp_path
    with reached(sshd, key_file=str(key)) as host:
        done = host.script("env; tr '\\0' '\\n' </proc/self/cmdline")
        host.rsync("/etc/hostname", host.there("/tmp/nexa-hostname"))
        told = [
            repr(host),
            str(host.login),
            repr(host.login),
            host.name,
            repr(vars(host)),
            done.stdout,
            caplog.text,
            *said,
        ]
        for path in [*Path("/proc").glob("[0-9]*/cmdline"), *Path("/proc").glob("[0-9]*/environ")]:
            with contextlib.suppress(OSError):
                told.append(path.read_bytes().decode(errors="replace"))
    assert not [text for text in told if SECRET in text]


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A real ssh-agent, to which this process speaks."""
    path = tmp_path / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL) as started:
        while not path.exists():
            time.sleep(0.01)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        yield path
        started.terminate()


def test_an_agent_lets_in_with_a_key_file_or_without(sshd: SshRig, agent: Path, tmp_path: Path) -> None:
    key = sshd.new_key("agents", passphrase=SECRET)
    assert "no agent that holds it was found" in refusal(sshd, key_file=str(key))
    asked = tmp_path / "askpass"
    asked.write_text(f"#!/bin/sh\necho {SECRET}\n")
    asked.chmod(0o700)
    helper = {**os.environ, "SSH_ASKPASS": str(asked), "SSH_ASKPASS_REQUIRE": "force"}
    subprocess.run(["ssh-add", "-q", str(key)], env=helper, check=True, stdin=subprocess.DEVNULL)
    for key_file in (None, str(key)):
        with reached(sshd, key_file=key_file) as host:
            assert host.script("echo in").stdout == "in\n"


def test_a_certificate_beside_the_key_lets_in(sshd: SshRig) -> None:
    key = sshd.new_key("certified-alone", authorized=False)
    assert "does not let ada in" in refusal(sshd, user="ada", key_file=str(key))
    sshd.certify(key, ADA)
    with reached(sshd, ADA, key_file=str(key)) as host:
        assert host.run(["id", "-un"]).stdout == "ada\n"


def test_a_jump_host_is_one_more_login_and_is_verified(sshd: SshRig, tmp_path: Path) -> None:
    with SshRig(tmp_path / "jump", accounts=sshd.accounts) as jump:
        jump.new_key("unused")
        (jump.folder / "server" / "authorized_keys").write_text(sshd.key.with_suffix(".pub").read_text())
        both = tmp_path / "both"
        both.write_text(sshd.known_hosts.read_text() + jump.known_hosts.read_text())
        through = f"root@127.0.0.1:{jump.port}"
        jump.forget_logins()
        with reached(sshd, jump_host=through, known_hosts=str(both)) as host:
            host.rsync("/etc/hostname", host.there(f"{tmp_path}/copy"))
            assert "127.0.0.1" in host.script("echo $SSH_CONNECTION").stdout
            assert (jump.logins(), sshd.logins()) == (1, 1)
            assert jump.cut() == 1
            time.sleep(0.3)  # what is sent before the cut is noticed has no answer
            assert host.script("echo again").stdout == "again\n"
        said = refusal(sshd, jump_host=through)
        assert f"the host key of root@127.0.0.1:{jump.port} is not known" in said
        said = refusal(sshd, jump_host=through, known_hosts=str(jump.known_hosts))
        assert f"the host key of root@127.0.0.1:{sshd.port} is not known" in said


ALIAS = """
import sys
from nexa_infra.errors import NexaError
from nexa_infra.hosts.login import Login
from nexa_infra.hosts.ssh import SshHost
try:
    print(SshHost(Login(sys.argv[1])).run(["id", "-un"]).stdout, end="")
except NexaError as error:
    print(error)
"""


def test_aliases_and_jump_hosts_of_the_users_own_configuration(sshd: SshRig, tmp_path: Path) -> None:
    home = tmp_path / ".ssh"
    home.mkdir()
    common = f"HostName 127.0.0.1\n Port {sshd.port}\n IdentityFile {sshd.key}\n"
    (home / "config").write_text(
        f"Host near\n User ada\n {common}Host far\n User bob\n {common} ProxyJump hop\n"
        f"Host hop\n User root\n HostName localhost\n Port {sshd.port}\n IdentityFile {sshd.key}\n"
    )

    def ask(alias: str) -> str:
        done = subprocess.run([sys.executable, "-c", ALIAS, alias], capture_output=True, text=True)
        assert done.stderr == ""
        return done.stdout.strip()

    assert re.search("host key of near is not known in ~/.ssh/known_hosts: log in once by `ssh near`", ask("near"))
    known = sshd.known_hosts.read_text()
    (home / "known_hosts").write_text(known)
    assert ask("near") == "ada"
    # The jump host is known by another name, and that one is not.
    assert re.search(f"host key of root@localhost:{sshd.port} is not known", ask("far"))
    (home / "known_hosts").write_text(known + known.replace("[127.0.0.1]", "[localhost]"))
    assert ask("far") == "bob"


SECOND = """
import sys
from nexa_infra.errors import NexaError
from nexa_infra.hosts.login import Login
from nexa_infra.hosts.ssh import SshHost
port, key, known, asks = sys.argv[1:]
host = SshHost(Login("127.0.0.1", "root", int(port), key, known, keyboard_interactive=asks == "yes"))
try:
    for _ in range(3):
        print(host.run(["id", "-un"]).stdout, end="", flush=True)
    host.rsync("/etc/hostname", host.there("/tmp/nexa-hostname"))
except NexaError as error:
    print("error:", error)
print("done")
"""


def in_a_terminal(argv: list[str], answer: str) -> str:
    """Run a command in a terminal of its own, answer each question, and return what the terminal showed."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(argv[0], argv)
    shown = b""
    answered = 0
    with contextlib.suppress(OSError):
        while select.select([terminal], [], [], 20)[0] and (piece := os.read(terminal, 4096)):
            shown += piece
            if (asked := len(re.findall(rb"[Pp]assword: ", shown))) > answered:
                answered = asked
                os.write(terminal, f"{answer}\n".encode())
    os.close(terminal)
    os.waitpid(child, 0)
    return shown.decode()


def test_a_second_factor_is_asked_for_once_in_the_terminal(rig_folder: Path) -> None:
    with SshRig(rig_folder, second_factor=True) as sshd:
        argv = [sys.executable, "-c", SECOND, str(sshd.port), str(sshd.key), str(sshd.known_hosts)]
        shown = in_a_terminal([*argv, "yes"], CODE)
        assert shown.count("root\r\n") == 3 and shown.rstrip().endswith("done") and "error" not in shown
        assert f"root@127.0.0.1:{sshd.port} asks:" in shown and CODE not in shown
        assert sshd.logins() <= 2  # the key, and the code: one login
        assert "does not let root in" in in_a_terminal([*argv, "yes"], "000000")
        assert (
            "error: root@127.0.0.1" in (shown := in_a_terminal([*argv, "no"], CODE))
            and "set keyboard_interactive" in shown
        )
        # With no terminal nobody can be asked, and what stands on the standard input is no answer.
        done = subprocess.run(
            [*argv, "yes"], input=f"{CODE}\n", capture_output=True, text=True, start_new_session=True, timeout=30
        )
        assert "asks for a second factor, and there is no terminal to ask in: start from one" in done.stdout
        assert done.stderr == ""


def test_what_a_login_says_of_itself() -> None:
    assert str(Login("h")) == "h" and str(Login("h", "u", 2222)) == "u@h:2222"
    full = Login("h", "u", 2222, "~/a key", "/k", "j@jump:3")
    assert full.by_hand == "ssh -p 2222 -i '~/a key' -o UserKnownHostsFile=/k -J j@jump:3 u@h"
    assert SshHost(full).there("/a b") == "REMOTE:/a b"


def test_a_host_is_not_reached_before_it_is_needed(sshd: SshRig) -> None:
    host = SshHost(login_to(sshd))
    host.close()
    assert sshd.logins() == 0
