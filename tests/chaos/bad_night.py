"""What the cases of a bad night share: a tally, and runs that a person takes to their ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nexa_infra.operations import launch, manage
from nexa_infra.runs.record import Run
from tests.chaos.tally import FULL, Tally, starts, sweep
from tests.chaos.test_submission import Site, resume

TRIALS = 24 if FULL else 10
PATIENCE = 240.0
SHORT = "sleep 1" if FULL else "sleep 0.3"


@pytest.fixture
def tally(site: Site, request: pytest.FixtureRequest) -> Tally:
    """The case's tally, and where its trials write what they do."""
    case = request.node.name.removeprefix("test_").replace("_", " ").replace("[", ", ").rstrip("]")
    return Tally(case, site.folder / "words")


def prepared(
    site: Site, tally: Tally, *more: str, trials: int = TRIALS, work: str = SHORT, over_ssh: bool = False,
    snapshot: Run | None = None,
) -> Run:  # fmt: skip
    """A run that lacks nothing but its submission."""
    return site.run(*sweep(tally.words, trials, work), *more, over_ssh=over_ssh, snapshot=snapshot)


def again(name: str) -> None:
    """Run what failed again, as the verb does."""
    launch.follow_run(manage.prepare_retry(name))


def finish(site: Site, run: Run, *, times: int = 6) -> list[str]:
    """Take a run to its end as a person does; return what was said on the way."""
    said = []
    for _ in range(times):
        told = site.client(resume, run).wait(PATIENCE)
        if told == "done":
            break
        said.append(told)
        if told.startswith("RunFailedError"):
            told = site.client(again, run).wait(PATIENCE)
            if told == "done":
                break
            said.append(told)
    else:
        raise AssertionError("\n".join(said))
    return said


def begun(tally: Tally, run: Run, count: int = 1) -> Callable[[], bool]:
    """Whether so many trials have begun."""
    return lambda: len(starts(tally.words, run)) >= count
