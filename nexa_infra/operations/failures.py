"""What a person is told when something goes wrong: one message, and an exit code."""

from __future__ import annotations

import errno

from pydantic import ValidationError

from nexa_infra.errors import NexaError

_REMEDIES = {
    errno.ENOSPC: "the disk is full: `nexa-infra clean` frees what old runs hold",
    errno.EDQUOT: "the quota is used up: `nexa-infra clean` frees what old runs hold",
    errno.EROFS: "nothing can be written there: set NEXA_HOME to another folder",
}


def failure(error: Exception) -> tuple[str, int] | None:
    """Return the message for an error that a person can cause, and the exit code it ends with; None for any other."""
    if isinstance(error, NexaError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return _of_the_system(error), 1
    if not isinstance(error, ValidationError):
        return None
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "it"
    return f"a record of the run is damaged: in a {error.title.lower()}, {where}: {first['msg']}", 1


def _of_the_system(error: OSError) -> str:
    what = error.strerror or str(error)
    told = f"{error.filename}: {what}" if error.filename is not None else what
    if error.filename2 is not None:
        told = f"{error.filename} -> {error.filename2}: {what}"
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{told} ({remedy})" if remedy else told
