"""The verbs of a working day: python -m nexa_infra VERB."""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

import cyclopts

from nexa_infra.verbs import keeping, looking, running  # noqa: F401 - each adds its verbs
from nexa_infra.verbs.common import app, complain, note


def main(argv: list[str] | None = None) -> NoReturn:
    """Run a verb; an error is one message on standard error, and its kind's exit code.

    0 is done, 1 failed, 2 not understood, 3 refused for its budget, 130 Ctrl-C, 143 SIGTERM.
    """
    _mend_streams()
    code = 0
    try:
        try:
            app(argv, exit_on_error=False, print_error=False)
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except cyclopts.CycloptsError as error:
        note(f"{error}\nSee `nexa-infra {' '.join((*(error.command_chain or ()), '--help'))}`.")
        code = 2
    except BrokenPipeError:
        # The reader has gone, as `head` does. What is left goes nowhere, at the interpreter's end too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 141
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        told = complain(error)
        if told is None:
            raise
        code = told
    raise SystemExit(code)


def _mend_streams() -> None:
    """Make sure that what is said can be written: streams may be closed, and an encoding may lack characters."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    main()
