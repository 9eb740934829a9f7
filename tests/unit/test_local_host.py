"""The machine at hand, which behaves as a host over SSH does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nexa_infra.errors import HostError
from nexa_infra.hosts.base import Completed
from nexa_infra.hosts.local import LocalHost

HOST = LocalHost()


def test_words_and_bytes_come_and_go_exactly() -> None:
    words = ["two words", "it's", "new\nline", "$(id)", "-rf", "", "ü\udcff"]
    assert HOST.run(["printf", "%s\\0", *words]).stdout.split("\0")[:-1] == words
    everything = "".join(map(chr, range(128))) + "\udc80\udcff\r\nü"
    assert HOST.run(["cat"], stdin=everything).stdout == everything
    assert HOST.run(["sh", "-c", "cat >&2"], stdin=everything).stderr == everything
    assert HOST.run(["cat"], stdin="x" * 3_000_000).stdout == "x" * 3_000_000
    assert HOST.run(["true"], stdin="x" * 3_000_000).returncode == 0
    with pytest.raises(ValueError, match="null byte"):
        HOST.run(["echo", "a\0b"])


def test_a_script_has_its_two_streams_and_its_exit_code() -> None:
    assert HOST.script("echo out; echo err >&2; printf tail; exit 3") == Completed(
        ("sh", "-s"), 3, "out\ntail", "err\n"
    )
    assert HOST.script("cat; read line; echo end").stdout == "end\n"  # nothing is on its input, the script neither
    assert HOST.script("echo 'never closed").returncode != 0
    assert HOST.script("\n".join(["true"] * 50_000 + ["echo long"])).stdout == "long\n"
    with pytest.raises(HostError, match="sh ended with 4: words"):
        HOST.script("echo words >&2; exit 4").check()


def test_where_and_with_what_a_command_runs(tmp_path: Path) -> None:
    assert HOST.run(["pwd"], cwd=tmp_path).stdout == f"{tmp_path}\n"
    assert HOST.run(["sh", "-c", 'echo "$A"'], env={"A": "b c"}).stdout == "b c\n"
    for argv in (["nexa-none"], ["if"], ["A=1", "true"]):
        with pytest.raises(HostError, match=f"{argv[0]} is not installed here"):
            HOST.run(argv)
        with pytest.raises(HostError, match=f"{argv[0]} is not installed here"):
            list(HOST.stream(argv))
    with pytest.raises(HostError, match="the folder /nexa/none is not there"):
        HOST.run(["true"], cwd=Path("/nexa/none"))
    with pytest.raises(HostError, match="could not be started here: Permission denied"):
        HOST.run([str(tmp_path)])


def test_what_stays_in_the_background_is_not_awaited(tmp_path: Path) -> None:
    begun = time.monotonic()
    assert HOST.script(f"(sleep 0.5; touch {tmp_path}/late; echo late) & echo now").stdout == "now\n"
    assert time.monotonic() - begun < 0.4
    time.sleep(0.6)
    assert (tmp_path / "late").exists()


def test_a_silent_command_is_ended_and_one_that_speaks_is_not(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="sleep has said nothing for 0.2 s here"):
        HOST.run(["sleep", "3073"], timeout=0.2)
    with pytest.raises(HostError, match="has said nothing for 0.2 s"):
        HOST.run(["sh", "-c", "exec >&- 2>&-; sleep 5"], timeout=0.2)
    done = HOST.script("for i in 1 2 3 4 5 6; do echo $i; sleep 0.1; done", timeout=0.4)
    assert done.stdout == "1\n2\n3\n4\n5\n6\n"


def test_a_stream_ends_with_its_command_or_its_reader(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\n")
    before = children()
    stream = HOST.stream(["tail", "-n", "+1", "-f", str(log)], every=0.05)
    assert next(piece for piece in stream if piece) == b"one\n"
    assert next(stream) == b""
    with log.open("a") as more:
        more.write("two\n")
    assert next(piece for piece in stream if piece) == b"two\n"
    stream.close()
    assert children() == before
    assert b"".join(HOST.stream(["sh", "-c", "seq 300000 >&2; printf 'a\\0b'"])) == b"a\0b"
    with pytest.raises(HostError, match="tail ended with 1 here: .*cannot open '/nexa/none'"):
        list(HOST.stream(["tail", "-f", "/nexa/none"]))
    with pytest.raises(HostError, match="sh was ended here by signal 9"):
        list(HOST.stream(["sh", "-c", "kill -9 $$"]))


def children() -> set[str]:
    return {child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()}


def test_a_copy_says_what_it_could_not_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a 'b'"
    source.mkdir()
    (source / "x").write_text("x")
    HOST.rsync(f"{source}/", HOST.there(f"{tmp_path}/copy/"), options=["-a"])
    assert (tmp_path / "copy" / "x").read_text() == "x"
    with pytest.raises(HostError, match=r"rsync could not copy everything: .*No such file.*\(exit code 23\)") as told:
        HOST.rsync("/nexa/none", str(tmp_path))
    assert "rsync error" not in str(told.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="rsync is not installed here: apt-get install rsync"):
        HOST.rsync(str(source), str(tmp_path))


def test_nothing_is_left_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        HOST.script("echo a; exit 1")
        list(HOST.stream(["echo", "a"]))
    assert len(list(Path("/proc/self/fd").iterdir())) == before
