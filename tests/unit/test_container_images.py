"""What an image is called, and what a word means that is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexa_infra.containers.images import Reference, file_named, parse_reference

DIGEST = f"sha256:{'ab' * 32}"


@pytest.mark.parametrize(
    ("text", "whole", "bare"),
    [
        ("alpine", "docker.io/library/alpine:latest", True),
        ("alpine:3.20", "docker.io/library/alpine:3.20", True),
        ("ada/train", "docker.io/ada/train:latest", True),
        ("ada/train@" + DIGEST, "docker.io/ada/train@" + DIGEST, True),
        ("docker.io/alpine", "docker.io/library/alpine:latest", False),
        ("index.docker.io/ada/train", "docker.io/ada/train:latest", False),
        ("docker://alpine", "docker.io/library/alpine:latest", True),
        ("docker://localhost/train", "localhost/train:latest", False),
        ("localhost:5000/train:1", "localhost:5000/train:1", False),
        ("127.0.0.1:5000/a/b/c:1_2.3-x", "127.0.0.1:5000/a/b/c:1_2.3-x", False),
        ("[::1]:5000/train", "[::1]:5000/train:latest", False),
        ("[2001:db8::1]/train", "[2001:db8::1]/train:latest", False),
        ("Registry.Example.org/lab/train", "Registry.Example.org/lab/train:latest", False),
        ("r.example.org/my__name/a-b.c--d", "r.example.org/my__name/a-b.c--d:latest", False),
        (f"r.example.org/train:1@{DIGEST}", f"r.example.org/train:1@{DIGEST}", False),
        ("nvcr.io#nvidia/pytorch:24.01-py3", "nvcr.io/nvidia/pytorch:24.01-py3", False),
        ("docker://r.example.org:5000#train", "r.example.org:5000/train:latest", False),
        ("train:5000", "docker.io/library/train:5000", True),  # a tag: a registry would have a name after it
    ],
)
def test_a_name_means_what_docker_pull_takes_it_for(text: str, whole: str, bare: bool) -> None:
    found = parse_reference(text)
    assert str(found) == whole
    assert found.bare is bare


def test_a_digest_alone_is_not_given_a_tag() -> None:
    found = parse_reference(f"r.example.org/train@{DIGEST}")
    assert (found.tag, found.digest) == (None, DIGEST)
    assert parse_reference("r.example.org/train:1").at(DIGEST) == f"r.example.org/train@{DIGEST}"


FORM = "write REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:DIGEST"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", f"'' is no image: {FORM}"),
        ("my train", f"'my train' is no image: {FORM}"),
        ("train:", f"'train:' is no image: {FORM}"),
        ("train:-1", f"'train:-1' is no image: {FORM}"),
        ("https://r.example.org/train", f"'https://r.example.org/train' is no image: {FORM}"),
        ("r.example.org/", f"'r.example.org/' is no image: {FORM}"),
        ("r.example.org//train", f"'r.example.org//train' is no image: {FORM}"),
        ("-r.example.org/train", f"'-r.example.org/train' is no image: {FORM}"),
        (".../train", f"'.../train' is no image: {FORM}"),
        ("train\n", f"'train\\n' is no image: {FORM}"),
        ("r.example.org/train:" + "x" * 129, f"'r.example.org/train:{'x' * 129}' is no image: {FORM}"),
        ("Train", "'Train' is no image: names are in small letters, train"),
        ("r.org/Lab/Train:V1", "'r.org/Lab/Train:V1' is no image: names are in small letters, r.org/lab/train:V1"),
        ("train@sha256:ab", "'train@sha256:ab' has no digest after @: one is sha256: and 64 hexadecimal digits"),
        ("train@latest", "'train@latest' has no digest after @: one is sha256: and 64 hexadecimal digits"),
        ("lab#train", "'lab#train' is no image: a registry has a dot or a port in its name, such as lab:5000"),
        ("#train", "'#train' is no image: a registry has a dot or a port in its name, such as lab:5000"),
    ],
)  # fmt: skip
def test_a_word_that_is_no_image_is_told_what_one_looks_like(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=r"is no image|has no digest") as caught:
        parse_reference(text)
    assert str(caught.value) == told


COMPONENTS = st.from_regex(r"[a-z0-9]{1,8}((\.|_|__|-{1,3})[a-z0-9]{1,8}){0,2}", fullmatch=True)
HOSTS = st.one_of(
    st.just("docker.io"),
    st.from_regex(r"[a-zA-Z0-9]{1,9}(\.[a-zA-Z0-9-]{0,5}[a-z0-9]){1,2}(:[1-9][0-9]{0,4})?", fullmatch=True),
    st.from_regex(r"(localhost|\[::1\]|127\.0\.0\.1)(:[1-9][0-9]{0,4})?", fullmatch=True),
)
TAGS = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
DIGESTS = st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True)


@given(HOSTS, st.lists(COMPONENTS, min_size=1, max_size=3), st.none() | TAGS, st.none() | DIGESTS)
def test_what_an_image_is_called_is_read_back_as_it_was(
    registry: str, names: list[str], tag: str | None, digest: str | None
) -> None:
    if registry == "docker.io" and len(names) == 1:
        names = ["library", *names]
    image = Reference(registry, "/".join(names), tag or (None if digest else "latest"), digest)
    assert parse_reference(str(image)) == image
    assert parse_reference(f"docker://{image}") == image


@given(st.text(alphabet="aZ09.:/@#-_[] \n~", max_size=30))
def test_whatever_is_read_reads_the_same_again(text: str) -> None:
    try:
        found = parse_reference(text)
    except ValueError as error:
        assert str(error).startswith(repr(text))  # noqa: PT017 - there may be none
        return
    again = parse_reference(str(found))
    assert str(again) == str(found)
    assert (again.name, again.tag, again.digest) == (found.name, found.tag, found.digest)


@pytest.mark.parametrize(
    ("image", "path"),
    [
        ("/images/train.sif", "/images/train.sif"),
        ("train.sif", "train.sif"),
        ("images/train.sqsh", "images/train.sqsh"),
        ("train.tar", "train.tar"),
        ("./train", "./train"),
        ("../train", "../train"),
        ("~/images/train", "~/images/train"),
        ("docker-archive:images/train", "images/train"),
        ("docker-archive:///images/train", "/images/train"),
        ("docker-archive:/images/train", "/images/train"),
        ("file:/images/train.sif", "/images/train.sif"),
        ("train", None),
        ("r.example.org/train.sif/x:1", None),
        (f"r.example.org/train@{DIGEST}", None),
        ("docker://train", None),
    ],
)
def test_a_file_is_known_by_how_it_is_written(image: str, path: str | None) -> None:
    assert file_named(image) == path
