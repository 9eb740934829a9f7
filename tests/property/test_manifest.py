"""A manifest says any folder's files, whatever their names, and reads back as what was written."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from nexa_infra.hosts.local import LocalHost
from nexa_infra.runs import manifest
from nexa_infra.runs.manifest import Content, contents_here, from_text, to_text

names = st.binary(min_size=1, max_size=40).filter(lambda name: b"\0" not in name)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
contents = st.builds(Content, digests, st.none() | st.integers(0, 2**63))


@given(st.dictionaries(names, contents))
def test_a_manifest_reads_back_as_what_was_written(found: dict[bytes, Content]) -> None:
    text = to_text(found)
    assert from_text(text) == found
    assert text.count("\n") == len(found) and text.replace("\n", "").isprintable()
    assert to_text(dict(reversed(found.items()))) == text
    text.encode()


nasty = st.sampled_from([b"\n", b"\\", b"\\n", b"\r", b" ", b"  ", b"\xff", b"\xc3\xa9", b"*", b"a", b"-", b"'", b'"'])
file_names = st.lists(nasty, min_size=1, max_size=5).map(b"".join).filter(lambda name: name not in {b".", b".."})


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(file_names, st.binary(max_size=8) | st.none(), max_size=6))
def test_find_and_sha256sum_say_the_same_of_a_folder_as_python_does(tree: dict[bytes, bytes | None]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number, (name, data) in enumerate(tree.items()):
            home = place.encode() + (b"/sub" if number % 2 else b"")
            Path(home.decode()).mkdir(exist_ok=True)
            path = home + b"/" + name
            if data is None:
                Path(path.decode("utf-8", "surrogateescape")).symlink_to(name.decode("utf-8", "surrogateescape"))
            else:
                Path(path.decode("utf-8", "surrogateescape")).write_bytes(data)
        assert manifest._there(LocalHost(), folder) == contents_here(folder)
