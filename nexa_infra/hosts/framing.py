"""A script for `/bin/sh -s` on another host, and its answer told apart from banners and start-up noise."""

from __future__ import annotations

import base64
import re
import secrets
from dataclasses import dataclass

from nexa_infra.hosts.shell import join, quote

# How much is read at once, bytes.
PIECE = 1 << 16


@dataclass(frozen=True)
class Framed:
    """A script between two marks that nothing else can print."""

    text: str
    mark: str

    def answer(self, printed: bytes | bytearray) -> tuple[bytes, int] | None:
        """Return what the script printed on one stream, and its exit code; `None` where that is not whole yet."""
        # The end alone is looked for first, and not from the start: a long answer comes in many pieces.
        mark = self.mark.encode()
        if printed.find(b"\n%s end " % mark, max(0, len(printed) - 2 * PIECE)) < 0:
            return None
        found = re.search(rb"\n%s begin\n(.*)\n%s end (\d+)\n" % (mark, mark), printed, re.DOTALL)
        return (bytes(found[1]), int(found[2])) if found else None


def framed(script: str) -> Framed:
    """Frame a POSIX script for a shell that may be sent others after it.

    It runs in a subshell of its own, with nothing on its standard input; what it writes to standard
    error comes between marks as well, so that one answer is told from the next.
    """
    mark = f"nexa-{secrets.token_hex(8)}"
    # One compound command: sh reads it whole before it runs any of it, so a connection that is
    # cut in the middle of the script has run nothing.
    text = (
        f"{{ printf '\\n%s begin\\n' {mark}; printf '\\n%s begin\\n' {mark} >&2\n(\n{script}\n) </dev/null\n"
        f"nexa_code=$?; printf '\\n%s end %d\\n' {mark} $nexa_code >&2\n"
        f"printf '\\n%s end %d\\n' {mark} $nexa_code\n}}\n"
    )
    return Framed(text, mark)


def command(argv: list[str], *, cwd: str | None = None, env: dict[str, str] | None = None, stdin: str = "") -> str:
    """Return a script that runs one command; `stdin` reaches it byte for byte."""
    lines = []
    if cwd is not None:
        lines.append(f"cd -- {quote(cwd)} || exit 126")
    words = join(["env", *(f"{name}={value}" for name, value in env.items()), *argv] if env else argv)
    if stdin:
        encoded = base64.b64encode(stdin.encode("utf-8", "surrogateescape")).decode()
        lines.append(f"base64 -d <<'NEXA_INPUT' | {words}\n{encoded}\nNEXA_INPUT")
    else:
        lines.append(words)
    return "\n".join(lines)


def write_file(path: str, content: bytes, *, mode: int = 0o600) -> str:
    """Return a script that writes a small file under a name of its own, and renames it."""
    staged = f"{path}.{secrets.token_hex(4)}"
    encoded = base64.b64encode(content).decode()
    return (
        f"(umask 077 && base64 -d >{quote(staged)} <<'NEXA_INPUT'\n{encoded}\nNEXA_INPUT\n) "
        f"&& chmod {mode:o} {quote(staged)} && mv -f -- {quote(staged)} {quote(path)}"
    )
