"""Scripts for a `/bin/sh -s` on another host, and their answers told apart from banners and start-up noise."""

from __future__ import annotations

import base64
import gzip
import io
import secrets
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass

from nexa_infra.hosts.shell import join, quote

# What is written as a text at most, bytes.
_MOST_TEXT = 65536


@dataclass(frozen=True)
class Framed:
    """A script whose answer comes between marks that nothing else can print."""

    text: str
    mark: str


class Listener:
    """What one stream of a shell prints for a framed script, from the mark of its begin to that of its end.

    `begun` says whether the script has started; `answer` is what it printed, and `code` its exit code,
    once both are whole; `after` is what came later.
    """

    def __init__(self, asked: Framed) -> None:
        self._begin = f"\n{asked.mark} begin\n".encode()
        self._end = f"\n{asked.mark} end ".encode()
        self._looked = 0
        self.begun = False
        self.answer = bytearray()
        self.code: int | None = None
        self.after = bytearray()

    def hear(self, piece: bytes) -> None:
        """Take what was printed next; each byte is looked at once, however long the answer is."""
        if self.code is not None:
            self.after += piece
            return
        self.answer += piece
        if not self.begun:
            at = self.answer.find(self._begin, self._looked)
            if at < 0:
                self._looked = max(0, len(self.answer) - len(self._begin))
                return
            del self.answer[: at + len(self._begin)]
            self.begun, self._looked = True, 0
        at = self.answer.find(self._end, self._looked)
        ends = self.answer.find(b"\n", at + len(self._end)) if at >= 0 else -1
        if ends < 0:
            self._looked = at if at >= 0 else max(0, len(self.answer) - len(self._end))
            return
        self.code = int(self.answer[at + len(self._end) : ends])
        self.after += self.answer[ends + 1 :]
        del self.answer[at:]


def framed(script: str) -> Framed:
    """Frame a POSIX script for a shell that may be sent others after it.

    It runs in a subshell of its own with nothing on its standard input, and each of its two streams comes
    between marks. It is one quoted word: neither `exit` nor a quote that is not closed reaches the shell.
    """
    mark = _mark()
    # One compound command: sh reads it whole before it runs any of it, so a connection that is cut in the middle of
    # the script has run nothing. What the script leaves in the background holds descriptor 8, the substitution's
    # pipe: the shell says that it is free only when none is left that could print into another script's answer.
    end = f"printf '\\n%s end %d\\n' {mark} $nexa_code"
    text = (
        f"{{ {_begin(mark)}; {_begin(mark)} >&2\n"
        f': "$( ( eval {quote(_whole(script))} ) </dev/null 8>&1 >&7 7>&-\n'
        f"nexa_code=$?; {end} >&2; {end} >&7\n"
        f")\"; printf '\\n%s free\\n' {mark}\n}} 7>&1\n"
    )
    return Framed(text, mark)


def alone(script: str) -> str:
    """Return a script for a shell that is sent nothing else: the same, with nothing on its standard input."""
    return f"{{ ( eval {quote(_whole(script))} ) </dev/null; exit; }}\n"


def is_free(asked: Framed, printed: bytes | bytearray) -> bool:
    """Say whether a shell, by what it printed after a script's end, can be sent another."""
    return f"\n{asked.mark} free\n".encode() in printed


def streamed(argv: list[str]) -> Framed:
    """Return a script that runs a long-lived command, and ends it when the shell's input ends.

    The shell ends with the command's exit code, its output when the command's does.
    """
    mark = _mark()
    text = (
        f"{{ {_begin(mark)}; {_begin(mark)} >&2\n{command(argv)} </dev/null 7<&- & nexa_child=$!\n"
        "{ cat <&7; kill $nexa_child; } >/dev/null 2>&1 &\n"
        "exec </dev/null >/dev/null 2>&1 7<&-; wait $nexa_child; exit $?\n} 7<&0\n"
    )
    return Framed(text, mark)


def replaced(argv: list[str]) -> Framed:
    """Return a script by which the shell becomes a command, which has the shell's streams from the mark on."""
    mark = _mark()
    return Framed(f"{{ {_begin(mark)}; exec {_words(argv)}\n}}\n", mark)


def command(argv: list[str], *, cwd: str | None = None, env: dict[str, str] | None = None, stdin: str = "") -> str:
    """Return a script that runs one command; `stdin` reaches it byte for byte.

    The command is a program, never a word that means something to the shell; env(1) is asked where there
    are variables to add.
    """
    lines = []
    if cwd is not None:
        lines.append(f"cd -- {quote(_whole(cwd))} || exit 126")
    # exec takes no assignment, keyword or builtin for a command, and saves a process.
    words = f"exec {_words(['env', *(f'{name}={value}' for name, value in env.items()), *argv] if env else argv)}"
    if stdin:
        lines.append(f"base64 -d <<'NEXA_INPUT' | {words}\n{_base64(stdin.encode('utf-8', 'surrogateescape'))}")
        lines.append("NEXA_INPUT")
    else:
        lines.append(words)
    return "\n".join(lines)


def write_file(path: str, content: bytes, *, mode: int = 0o600) -> str:
    """Return a script that writes a small file under a name of its own, and renames it."""
    staged = f"{path}.{secrets.token_hex(4)}"
    chmod = "" if mode == 0o600 else f"&& chmod {mode:o} {quote(staged)} "
    # A text needs no program to be written, only the shell.
    made = f"base64 -d >{quote(staged)} <<'NEXA_INPUT'\n{_base64(content)}\nNEXA_INPUT\n"
    if len(content) <= _MOST_TEXT and content.isascii() and b"\0" not in content:
        made = f"printf %s {quote(content.decode())} >{quote(staged)}"
    return f"(umask 077 && {made}) {chmod}&& mv -f -- {quote(staged)} {quote(path)}"


def write_files(folder: str, contents: Mapping[str, bytes]) -> str:
    """Return a script that writes small files into a folder, each whole or not at all."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o600
            archive.addfile(entry, io.BytesIO(content))
    staged = quote(f"{folder}/.{secrets.token_hex(4)}")
    data = _base64(gzip.compress(packed.getvalue(), mtime=0))
    return (
        f"mkdir -- {staged} && base64 -d <<'NEXA_INPUT' | tar -xzf - -C {staged} --no-same-owner && "
        f"mv -f -- {staged}/* {quote(folder)}/ && rmdir -- {staged}\n{data}\nNEXA_INPUT\n"
    )


def _mark() -> str:
    return f"nexa-{secrets.token_hex(8)}"


def _begin(mark: str) -> str:
    return f"printf '\\n%s begin\\n' {mark}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _words(argv: list[str]) -> str:
    if not argv or argv[0].startswith("-"):
        raise ValueError(f"{argv[:1]} is no command")
    return join(_whole(word) for word in argv)


def _whole(text: str) -> str:
    # As subprocess does: a shell would leave the rest of the word out, or the character.
    if "\0" in text:
        raise ValueError("embedded null byte")
    return text
