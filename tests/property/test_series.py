"""metrics.jsonl by hypothesis: however it comes, it says the same."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from nexa_infra.runs.series import Recorder

VALUES = st.one_of(st.floats(), st.integers(), st.booleans(), st.none(), st.text(max_size=3))
NAMES = st.sampled_from(["loss", "val_loss", "accuracy", "step", "epoch", "total_steps", "ünï", 'a"b\\c'])
OBJECTS = st.dictionaries(NAMES, VALUES | st.dictionaries(NAMES, VALUES, max_size=2), max_size=4)
LINES = st.lists(st.one_of(OBJECTS.map(lambda one: json.dumps(one).encode()), st.binary(max_size=12)), max_size=12)


def told(recorder: Recorder) -> str:
    return repr((recorder.log(), recorder.unsound(), recorder.lines, recorder.taken))


@given(LINES, st.lists(st.integers(0, 400), max_size=8), st.lists(st.integers(0, 300), max_size=3))
def test_the_pieces_in_which_a_log_comes_do_not_matter(lines: list[bytes], cuts: list[int], starts: list[int]) -> None:
    data = b"\n".join(lines)
    whole, pieces = Recorder(starts), Recorder(starts)
    whole.take(data)
    at = 0
    for cut in sorted(min(cut, len(data)) for cut in cuts):
        pieces.take(data[at:cut])
        at = cut
    pieces.take(data[at:])
    assert told(pieces) == told(whole)
    whole.end()
    pieces.end()
    assert told(pieces) == told(whole)


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(allow_nan=False, allow_infinity=False)), min_size=1))
def test_the_last_value_of_each_step_stands(values: list[tuple[int, float]]) -> None:
    recorder = Recorder()
    for step, value in values:
        recorder.take(json.dumps({"step": step, "loss": value}).encode() + b"\n")
    log = recorder.log()
    assert log is not None
    (loss,) = log.series
    assert dict(loss.points) == dict(values)
    assert list(loss.points) == sorted(loss.points)


@given(st.lists(st.floats(), min_size=1))
def test_every_value_that_is_no_finite_number_is_known_with_an_offset_that_is_its_lines(values: list[float]) -> None:
    lines = [json.dumps({"loss": value}).encode() + b"\n" for value in values]
    recorder = Recorder()
    recorder.take(b"".join(lines))
    for number in range(len(lines) + 1):
        offset = sum(map(len, lines[:number]))
        left = [not math.isfinite(value) for value in values[number:]]
        assert bool(recorder.unsound(offset)) == any(left)
