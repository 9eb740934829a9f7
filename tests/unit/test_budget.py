"""What a budget leaves room for."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

from nexa_infra.monitoring.charges import Charge
from nexa_infra.scheduling.budget import LIVES_AHEAD, Limit, affordable, lives_of


def limit(usd: str) -> Limit:
    """A budget under which an attempt costs up to 1 USD, and a life up to 0.1."""
    rate = Decimal(60)  # an hour of a core: 1 USD a minute
    return Limit(Decimal(usd), "core-hour", rate, Decimal(1), Decimal("0.1"), Decimal("0.001"))


def room(usd: str, asked: int = 0, charges: dict[tuple[int, int], Charge] | None = None, **more: object) -> int:
    tasks = [[[(trial, 1)] for trial in range(asked)]]
    over = dict.fromkeys(charges or {}, True)
    lives: list[float | None] = more.get("lives", [])  # type: ignore[assignment]
    return affordable(limit(usd), tasks, charges or {}, over, lives)


def test_what_may_begin_is_what_is_left_besides_the_steward() -> None:
    ahead = LIVES_AHEAD * Decimal("0.1")
    assert room(str(5 + ahead)) == 5
    assert room(str(Decimal("4.999") + ahead)) == 4
    assert room(str(ahead)) == 0
    assert room("0") == 0


def test_what_runs_counts_as_much_as_it_may_cost_and_what_has_ended_as_much_as_it_did() -> None:
    assert room("10.3", asked=4) == 6
    # Thirty seconds of a core were half a dollar.
    half = {(trial, 1): Charge(30, 1, 0) for trial in range(4)}
    assert room("10.3", asked=4, charges=half) == 8
    # What was restarted besides is paid for as well.
    assert room("10.3", asked=4, charges={**half, (0, 2): Charge(60, 1, 0)}) == 7
    unknown = {(0, 1): Charge(30, 1, 0, billing=None)}
    assert affordable(limit("10.3"), [[[(0, 1)]]], unknown, {}, []) == 9, "it has not ended"


def test_a_steward_pays_for_its_lives() -> None:
    assert room("5.3", lives=[100.0]) == 4
    assert room("5.3", lives=[None]) == 5, "the one that counts is among those that are ahead"


def test_a_life_that_was_killed_had_ended_when_the_next_began(tmp_path: Path) -> None:
    assert lives_of(tmp_path) == []
    lines = ["begin\t3\t0\t100.0", "end\t3\t0\t102.5", "begin\t3\t1\t110.0", "begin\t3\t2\t140.0", "torn"]
    (tmp_path / "lives").write_text("\n".join(lines) + "\n")
    assert lives_of(tmp_path) == [2.5, 30.0, None]
