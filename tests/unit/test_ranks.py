"""Which rank of a gang failed first, from what its nodes recorded and its ranks wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexa_infra.runs.ranks import (
    Gang,
    RankEnd,
    candidates,
    error_of,
    first_failure,
    last_words,
    no_rendezvous,
    read_gang,
    read_records,
)

TRACEBACK = """\
node n1 pid 7 rank 3 of 4
Traceback (most recent call last):
  File "train.py", line 3, in <module>
    raise ValueError("no such layer: 7")
ValueError: no such layer: 7
"""
GONE = """\
[rank1]: Traceback (most recent call last):
[rank1]:   File "/w/train.py", line 9, in <module>
[rank1]:     loss.backward()
[rank1]: RuntimeError: [pair.cc:534] Connection closed by peer [127.0.0.1]:3111
"""
WATCHDOG = """\
[rank2]:[E1124 08:15:00 ProcessGroupNCCL.cpp:1895] [Rank 2] Process group watchdog thread terminated with exception
terminate called after throwing an instance of 'c10::DistBackendError'
"""


def gang(*ends: tuple[int, int, float], restarts: int = 0) -> Gang:
    """Make a gang of `(rank, code, moment)`, two ranks a node."""
    made = [RankEnd(rank, restarts, f"n{rank // 2 + 1}", code, moment) for rank, code, moment in ends]
    return Gang(("n1", "n2"), frozenset(range(4)), restarts, "n1:1", tuple(sorted(made, key=lambda end: end.moment)))


def told(made: Gang, logs: dict[int, str]) -> str | None:
    failure = first_failure(made, logs)
    return str(failure) if failure else None


# ---- reading ----


def test_what_nodes_recorded_is_read_in_order_of_time() -> None:
    one = "node\tn1\t1.0\tn1:2000\nagent\t5\nstart\t0\t0\t7\t2.0\nstart\t1\t0\t8\t2.0\nend\t1\t0\t1\t9.5\nover\t1\n"
    two = "node\tn2\t1.0\tn1:2000\nstart\t2\t0\t7\t2.0\nend\t2\t0\t137\t9.25\n"
    found = read_gang([(1, two), (0, one)])
    assert found.nodes == ("n1", "n2") and found.endpoint == "n1:2000"
    assert found.started == {0, 1, 2} and found.restarts == 0
    assert found.ends == (RankEnd(2, 0, "n2", 137, 9.25), RankEnd(1, 0, "n1", 1, 9.5))
    assert [end.signal for end in found.ends] == ["SIGKILL", None]


def test_a_torn_line_is_left_out_and_takes_no_other_with_it() -> None:
    text = "node\tn1\t1.0\t\nstart\t0\t0\t7\t2.0\nend\t0\tstart\t1\t0\t8\t2.0\nend\t1\t0\t1\t3.0\nend\t0\t0\t1"
    found = read_gang([(0, text)])
    assert found.started == {0, 1}
    assert found.ends == (RankEnd(1, 0, "n1", 1, 3.0),), "the last line has no end: it was never whole"


@pytest.mark.parametrize(
    "line",
    [
        "end\t0\t0\t1\tnan",
        "end\t0\t0\t1\tinf",
        "end\t0\t0\t\t1.0",
        "start\t²\t0\t7\t1.0",
        f"start\t{'9' * 5000}\t0\t7\t1",
    ],
)
def test_a_line_that_is_no_record_is_left_out(line: str) -> None:
    found = read_gang([(0, f"node\tn1\t1.0\t\n{line}\n")])
    assert found == Gang(("n1",))


def test_only_the_files_of_nodes_are_records(tmp_path: Path) -> None:
    (tmp_path / "node-0").write_bytes(b"node\tn1\t1.0\t\n\xff\xfe\n")
    for name in ("node-x", "node-", "node-²", "rank-0.log"):
        (tmp_path / name).write_text("node\tn9\t1.0\t\n")
    assert read_gang(read_records(tmp_path)).nodes == ("n1",)
    assert read_records(tmp_path / "nothing") == []


# ---- which was first ----


def test_a_killed_rank_comes_before_those_that_failed_by_its_absence() -> None:
    made = gang((0, 1, 99.0), (1, 1, 99.1), (2, 137, 100.0), (3, 1, 100.2))
    assert told(made, dict.fromkeys((0, 1, 3), GONE)) == "rank 2 on n2 was ended by SIGKILL"


def test_an_error_of_its_own_comes_before_earlier_ones_by_another_node_s_clock() -> None:
    made = gang((0, 1, 70.0), (1, 1, 70.5), (2, 1, 100.2), (3, 1, 100.0))
    logs = {0: GONE, 1: GONE, 2: GONE, 3: TRACEBACK}
    assert told(made, logs) == "rank 3 on n2 failed: ValueError: no such layer: 7"


def test_an_error_more_than_a_minute_later_is_no_cause() -> None:
    made = gang((0, 1, 10.0), (3, 1, 100.0))
    assert told(made, {0: GONE, 3: TRACEBACK}) == (
        "rank 0 on n1 failed: RuntimeError: [pair.cc:534] Connection closed by peer [127.0.0.1]:3111"
    )


def test_a_rank_that_torchrun_ended_is_not_named_where_another_failed() -> None:
    made = gang((0, 143, 99.0), (1, 143, 99.0), (2, 143, 99.0), (3, 1, 100.0))
    assert told(made, {}) == "rank 3 on n2 ended with exit code 1"
    assert told(made, {3: GONE}) == f"rank 3 on n2 failed: {error_of(GONE)}"
    assert told(gang((0, 143, 99.0), (1, 143, 98.0)), {}) == "rank 1 on n1 was ended by SIGTERM"


def test_ranks_that_were_ended_long_ago_do_not_hide_a_failure() -> None:
    # A node went: torchrun ended the others, and started them again without counting that as a restart.
    made = gang((0, 143, 10.0), (1, 143, 10.0), (0, 143, 1000.1), (1, 1, 1000.0))
    assert told(made, {1: TRACEBACK}) == "rank 1 on n1 failed: ValueError: no such layer: 7"


def test_an_abort_by_a_watchdog_follows_from_another_s_failure_and_one_of_its_own_does_not() -> None:
    made = gang((2, 134, 99.0), (3, 1, 100.0))
    assert told(made, {2: WATCHDOG, 3: TRACEBACK}) == "rank 3 on n2 failed: ValueError: no such layer: 7"
    assert told(made, {2: "free(): invalid pointer\n", 3: GONE}) == "rank 2 on n2 was ended by SIGABRT"
    assert told(gang((2, 134, 99.0)), {2: WATCHDOG}) == "rank 2 on n2 was ended by SIGABRT"


def test_threads_that_abort_after_an_exception_do_not_hide_it() -> None:
    raised = 'Traceback (most recent call last):\n  File "fault.py", line 9\nValueError: no such layer: 7\n'
    made = gang((2, 134, 99.0))
    left = f"{raised}terminate called without an active exception\n"
    assert told(made, {2: left}) == "rank 2 on n2 failed: ValueError: no such layer: 7"
    # One that was caught, and of which the program told before.
    assert told(made, {2: f"{raised}step 3\nfree(): invalid pointer\n"}) == "rank 2 on n2 was ended by SIGABRT"


def test_only_the_last_restart_counts() -> None:
    text = (
        "node\tn1\t1.0\t\nstart\t0\t0\t7\t1\nend\t0\t0\t137\t2.0\nstart\t0\t1\t8\t3\nstart\t1\t1\t9\t3\n"
        "end\t1\t1\t3\t4.0\nend\t0\t1\t143\t4.1\n"
    )
    found = read_gang([(0, text)])
    assert found.restarts == 1 and len(found.ends) == 3
    assert told(found, {}) == "rank 1 on n1 (restart 1) ended with exit code 3"
    assert told(read_gang([(0, text.partition("end\t1\t1")[0])]), {}) is None, "it was started again, and runs"


def test_ranks_that_ended_well_have_not_failed() -> None:
    assert told(gang((0, 0, 1.0), (1, 0, 1.0)), {0: TRACEBACK}) is None
    assert first_failure(Gang(), {}) is None


def test_few_logs_are_asked_for() -> None:
    made = gang(*((rank, 143, 1.0) for rank in range(500)), (500, 1, 1.5), (501, 139, 2.0))
    assert [end.rank for end in candidates(made)][:2] == [501, 500]
    assert len(candidates(made)) == 8


# ---- last words ----


def test_a_traceback_is_shown_whole_without_the_tags_of_its_rank() -> None:
    assert last_words(f"much\nbefore\n{TRACEBACK}") == TRACEBACK.partition("\n")[2].rstrip()
    assert last_words(GONE).splitlines()[1:] == [
        '  File "/w/train.py", line 9, in <module>',
        "    loss.backward()",
        "RuntimeError: [pair.cc:534] Connection closed by peer [127.0.0.1]:3111",
    ]
    assert error_of(GONE).startswith("RuntimeError: [pair.cc:534] Connection closed")


def test_the_last_of_several_errors_is_meant() -> None:
    chained = "Traceback (most recent call last):\n  x\nKeyError: 1\n\nDuring handling of the above exception:\n\n"
    assert error_of(chained + TRACEBACK) == "ValueError: no such layer: 7"
    assert error_of("Traceback (most recent call last):\n  x\nKeyboardInterrupt\n") == "KeyboardInterrupt"
    assert error_of("Traceback (most recent call last):\n  x\npkg.errors.Odd: y\nand more\n") == "pkg.errors.Odd: y"


def test_without_a_traceback_the_last_lines_are_shown() -> None:
    assert last_words("".join(f"{n}\n" for n in range(50)), lines=2) == "48\n49"
    assert error_of("no traceback") == last_words("") == ""


def test_a_log_that_is_no_text_is_shown_as_far_as_it_goes() -> None:
    junk = bytes(range(256)).decode("utf-8", "replace") * 50
    made = gang((1, 1, 1.0))
    assert told(made, {1: junk}) == "rank 1 on n1 ended with exit code 1"
    assert told(made, {1: junk + "\n" + TRACEBACK}) == "rank 1 on n1 failed: ValueError: no such layer: 7"


# ---- nodes that do not meet ----


def test_nodes_that_have_not_met_are_named_with_the_place() -> None:
    came = "node\tn{0}\t1.0\tn1:2000\nagent\t5\nover\t1\n"
    both = read_gang([(number, came.format(number + 1)) for number in range(2)])
    assert (no_rendezvous(both, 2, 30) or "").startswith(
        "no rendezvous: n1, n2 came, and they did not all meet at n1:2000 within 30 s"
    )
    assert "n1 alone of 2 nodes came" in (no_rendezvous(read_gang([(0, came.format(1))]), 2, 30) or "")
    assert no_rendezvous(read_gang([(0, came.format(1) + "start\t0\t0\t7\t1.0\n")]), 2, 30) is None
    assert no_rendezvous(Gang(), 2, 30) is None, "they have not come to it"
    assert no_rendezvous(both, 1, 30) is None


# ---- whatever was written ----

WORDS = st.sampled_from(["node", "start", "end", "over", "agent", "0", "1", "-1", "137", "143", "1.5", "nan", "x", "²"])
LINES = st.lists(st.lists(WORDS | st.text(max_size=6), max_size=6).map("\t".join), max_size=12)
LOGS = st.text(max_size=80) | st.sampled_from([TRACEBACK, GONE, WATCHDOG, TRACEBACK[:60], ""])


@given(
    records=st.lists(st.tuples(st.integers(0, 3), LINES.map("\n".join) | st.text()), max_size=4),
    logs=st.dictionaries(st.integers(-1, 4), LOGS),
)
def test_nothing_that_was_written_is_too_odd(records: list[tuple[int, str]], logs: dict[int, str]) -> None:
    found = read_gang(records)
    failure = first_failure(found, logs)
    assert (failure is None) == (not found.failures)
    if failure is not None:
        assert str(failure).startswith(f"rank {failure.end.rank} on ") and len(failure.words) <= 4000
        others = [end for end in found.failures if end.signal != "SIGTERM"]
        assert failure.end.signal != "SIGTERM" or not others
    assert isinstance(no_rendezvous(found, 2, 1), (str, type(None)))
