"""Framed scripts, run by real shells: dash, and bash where it is called as sh."""

from __future__ import annotations

import base64
import re
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexa_infra.hosts.framing import Framed, Listener, command, framed, is_free, replaced, streamed, write_file

SHELLS = {"sh": ["/bin/sh", "-s"], "bash": ["bash", "--posix", "-s"]}
WORD = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


def run(text: str, shell: str = "sh", stdin: bytes = b"") -> tuple[bytes, bytes]:
    """What a shell prints that is sent a text, and its end."""
    done = subprocess.run(SHELLS[shell], input=text.encode() + stdin, capture_output=True, timeout=30)
    return done.stdout, done.stderr


def heard(asked: Framed, printed: bytes, size: int = 1 << 20) -> Listener:
    listener = Listener(asked)
    for at in range(0, len(printed), size):
        listener.hear(printed[at : at + size])
    return listener


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("script", "stdout", "stderr", "code"),
    [
        ("echo out; echo err >&2", b"out\n", b"err\n", 0),
        ("printf tail; exit 7", b"tail", b"", 7),
        ("set -e; echo a; false; echo b", b"a\n", b"", 1),
        ('read line; cat; echo "[$line]"', b"[]\n", b"", 0),
        ("echo it\\'s '$x' \"`echo y`\" \\\\", b"it's $x y \\\n", b"", 0),
        ("cat <<'END'\na 'b' $c\nEND\necho d", b"a 'b' $c\nd\n", b"", 0),
        ("kill -9 $$; echo on; exit 3", b"on\n", b"", 3),
        ("sh -c 'kill -TERM $$'", b"", None, 143),
        ("", b"", b"", 0),
    ],
)
def test_an_answer_is_what_was_printed(shell: str, script: str, stdout: bytes, stderr: bytes | None, code: int) -> None:
    asked = framed(script)
    told, complained = (heard(asked, printed) for printed in run(asked.text, shell))
    assert (bytes(told.answer), told.code, complained.code) == (stdout, code, code)
    assert stderr is None or complained.answer == stderr


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    "script", ["'", '"', "`", "$(", "cat <<END", "if", "}", ")", "done", "\\", "#", "exec false", ":;"]
)
def test_no_script_reaches_what_comes_after_it(shell: str, script: str) -> None:
    first, second = framed(script), framed("echo next; exit 5")
    stdout, stderr = run(first.text + second.text, shell)
    assert heard(first, stdout).code is not None and heard(first, stderr).code is not None
    assert is_free(first, heard(first, stdout).after)
    told = heard(second, stdout)
    assert (bytes(told.answer), told.code) == (b"next\n", 5)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_that_arrives_in_part_runs_nothing(shell: str, tmp_path: Path) -> None:
    text = framed(f"touch '{tmp_path}/ran'\n" + "true\n" * 3000).text
    for size in (30, 200, 9000, len(text) - 30, len(text) - 8):
        run(text[:size], shell)
        assert not (tmp_path / "ran").exists()
    run(text, shell)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_is_not_free_while_something_in_the_background_could_print(shell: str) -> None:
    asked = framed("(sleep 0.4; echo late) & echo now")
    with subprocess.Popen(SHELLS[shell], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as started:
        assert started.stdin and started.stdout
        started.stdin.write(asked.text.encode())
        told, begun = Listener(asked), time.monotonic()
        while told.code is None:
            told.hear(started.stdout.read(1000))
        assert told.answer == b"now\n" and time.monotonic() - begun < 0.35
        assert not is_free(asked, told.after)
        while not is_free(asked, told.after):
            told.hear(started.stdout.read(1000))
        assert told.after.startswith(b"late\n") and time.monotonic() - begun >= 0.4
        started.stdin.close()


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1 << 20])
def test_an_answer_is_the_same_in_whatever_pieces_it_comes(size: int) -> None:
    asked = framed("")
    mark = asked.mark.encode()
    answer = b"\n%s beg\n%s en" % (mark, mark) + bytes(range(256)) * 20 + b"\n\n%s" % mark
    printed = b"Welcome %s begin\n%s" % (mark, mark) + b"\n%s begin\n%s\n%s end 12\nafter" % (mark, answer, mark)
    told = heard(asked, printed, size)
    assert (bytes(told.answer), told.code, bytes(told.after)) == (answer, 12, b"after")
    for short in (len(printed) - 6, len(printed) - 8, len(printed) - 20):
        assert heard(asked, printed[:short], size).code is None


def test_long_answers_take_linear_time() -> None:
    asked = framed("")
    listener = Listener(asked)
    begun = time.monotonic()
    listener.hear(f"\n{asked.mark} begin\n".encode())
    for _ in range(4000):
        listener.hear(b"\nnexa" * 2000)
    listener.hear(f"\n{asked.mark} end 0\n".encode())
    assert listener.code == 0 and len(listener.answer) == 40_000_000
    assert time.monotonic() - begun < 3.0


@settings(max_examples=30, deadline=None)
@given(words=st.lists(WORD, max_size=5), stdin=st.text(st.characters(exclude_categories=["Cs"]), max_size=50))
def test_words_and_input_arrive_as_they_are(words: list[str], stdin: str) -> None:
    asked = framed(command(["sh", "-c", 'printf "%s\\0" "$@"; cat', "sh", *words], stdin=stdin, env={"A": "b"}))
    told = heard(asked, run(asked.text)[0])
    expected = "".join(f"{word}\0" for word in words) if words else "\0"
    assert told.answer.decode() == expected + stdin


def test_a_command_is_a_program() -> None:
    for argv in (["if"], ["A=1", "true"], ["cd", "/"], ["nexa-none"]):
        asked = framed(command(argv))
        stdout, stderr = run(asked.text)
        assert heard(asked, stdout).code == 127
        assert re.search(rf"exec: {argv[0]}: not found", heard(asked, stderr).answer.decode())
    for bad in (["a\0b"], [], ["-x"]):
        with pytest.raises(ValueError, match="null byte|is no command"):
            command(bad)
    with pytest.raises(ValueError, match="null byte"):
        framed("echo a\0b")


def test_a_folder_that_is_not_there_is_no_place_to_run_in() -> None:
    asked = framed(command(["pwd"], cwd="/nexa/none"))
    assert heard(asked, run(asked.text)[0]).code == 126
    asked = framed(command(["pwd"], cwd="/usr"))
    assert heard(asked, run(asked.text)[0]).answer == b"/usr\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_a_stream_ends_with_its_input_or_by_itself(shell: str) -> None:
    asked = streamed(["sleep", "3072"])
    begun = time.monotonic()
    done = subprocess.run(SHELLS[shell], input=asked.text.encode(), capture_output=True, timeout=10)
    assert done.returncode == 143 and time.monotonic() - begun < 2.0
    asked = streamed(["sh", "-c", "echo a; echo b >&2; exit 6"])
    with subprocess.Popen(
        SHELLS[shell], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as ended:
        assert ended.stdin and ended.stdout and ended.stderr
        ended.stdin.write(asked.text.encode())
        ended.stdin.flush()
        assert heard(asked, ended.stdout.read()).answer == b"a\n"
        assert heard(asked, ended.stderr.read()).answer == b"b\n"
        assert ended.wait(5) == 6


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_becomes_the_command_that_has_its_streams(shell: str) -> None:
    asked = replaced(["cat"])
    with subprocess.Popen(SHELLS[shell], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as started:
        assert started.stdin and started.stdout
        started.stdin.write(asked.text.encode())
        told = Listener(asked)
        while not told.begun:
            told.hear(started.stdout.read(100))
        started.stdin.write(b"\0echo no\n")
        started.stdin.close()
        assert bytes(told.answer) + started.stdout.read() == b"\0echo no\n"


def test_a_file_is_written_whole_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a 'b'\n-c"
    content = bytes(range(256)) * 1000
    asked = framed(write_file(str(path), content))
    assert heard(asked, run(asked.text)[0]).code == 0
    assert path.read_bytes() == content and path.stat().st_mode & 0o777 == 0o600
    asked = framed(write_file(str(path), b"", mode=0o755))
    assert heard(asked, run(asked.text)[0]).code == 0
    assert path.read_bytes() == b"" and path.stat().st_mode & 0o777 == 0o755
    assert list(tmp_path.iterdir()) == [path]
    asked = framed(write_file(f"{tmp_path}/none/x", b"x"))
    assert heard(asked, run(asked.text)[0]).code != 0
    assert base64.b64encode(b"\xff").decode() in write_file("/x", b"\xff")
    text = b"-n 'a' $HOME `b` \\n %s\r\n\n"
    asked = framed(write_file(str(path), text))
    assert heard(asked, run(asked.text)[0]).code == 0
    assert path.read_bytes() == text and path.stat().st_mode & 0o777 == 0o600
