"""What run_container refuses before anything runs, and what it hands to Docker's engine, which is a stand-in here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docker
import pytest

from nexa_infra.containers import docker as engine
from nexa_infra.containers import pull
from nexa_infra.containers.catalog import Catalog, Target
from nexa_infra.containers.runner import run_container
from nexa_infra.errors import ConfigError, ContainerError
from nexa_infra.runs.record import Container
from nexa_infra.spec.container import Mount

CATALOG = Catalog(targets={"train-light": Target(image="lab/light:1", command=("true",)), "bare": Target(image="b:1")})
PINNED = "localhost:1/lab/light@sha256:" + "ab" * 32
LOCAL = "http+docker://localhost"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NEXA_HOME", str(tmp_path / "home"))
    return tmp_path


def an_engine(base_url: str = LOCAL) -> Any:
    """An engine that has every image."""
    api = SimpleNamespace(base_url=base_url, inspect_image=lambda _: {"Id": "sha256:" + "ab" * 32, "RepoDigests": []})
    return SimpleNamespace(api=api)


@pytest.mark.parametrize(
    ("target", "asked", "told"),
    [
        ("train-lite", {}, r"no target 'train-lite' \(did you mean 'train-light'\?\); there are bare, train-light"),
        ("bare", {}, r"the target bare has no command of its own: give one, command=\[…\]"),
        ("train-light", {"workspace": "/"}, r"workspace: / is the whole machine: name the folder of the code"),
        ("train-light", {"workspace": "/proc/nowhere"}, r"workspace: /proc/nowhere is no folder"),
        ("train-light", {"runtime": "none"}, r"runtime: is none: run the program itself"),
        (
            "train-light",
            {"override_image": "lab/l@sha256:" + "ab" * 32, "runtime": "pyxis"},
            r"Pyxis starts containers as",
        ),
        ("train-light", {"memory": "much"}, r"run_container: memory: 'much' is no size: write a number with K, M, G"),
        ("train-light", {"extra_env": {"HOME": "/x"}}, r"HOME"),
        (
            "train-light",
            {"mounts": [Mount(source="/proc/nowhere", target="/x")]},
            r"/proc/nowhere is not there: make it",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    target: str, asked: dict[str, Any], told: str, here: Path
) -> None:
    client = None if "runtime" in asked else an_engine()
    with pytest.raises(ConfigError, match=told):
        run_container(target, catalog=CATALOG, client=client, **asked)
    assert not (here / "home").exists()


def test_an_engine_is_here_where_its_socket_is_and_elsewhere_by_tcp_and_ssh() -> None:
    here = docker.DockerClient(base_url="unix:///run/x.sock", version="1.41")
    there = docker.DockerClient(base_url="tcp://engine.example.org:2376", version="1.41")
    assert [engine.is_remote(each) for each in (here, there, an_engine("http+docker://ssh"))] == [False, True, True]


def handed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Catch what is handed to the engine."""
    caught: dict[str, Any] = {}

    def run(_client: Any, _container: Any, argv: list[str], **more: Any) -> engine.Ending:
        caught.update(more, argv=argv)
        return engine.Ending(0, "exited", 0.1)

    monkeypatch.setattr(engine, "run", run)
    return caught


def test_code_and_run_directory_are_seen_where_they_are_and_a_home_is_the_callers(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "cache").mkdir()
    caught = handed(monkeypatch)
    mounts = [Mount(source="~/cache", target="/cache", read_only=False)]
    result = run_container("train-light", catalog=CATALOG, client=an_engine(), mounts=mounts, bootstrap_args=["--fast"])
    assert result.ok
    assert caught["argv"] == ["true", "--fast"]
    assert [(each.source, each.target, each.read_only) for each in caught["mounts"]] == [
        (str(here), str(here), True),
        (str(result.directory), str(result.directory), False),
        (str(here / "cache"), "/cache", False),
    ]


def test_of_an_engine_elsewhere_only_its_own_paths_are_mounted(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caught = handed(monkeypatch)
    mounts = [Mount(source="/datasets/there", target="/data")]
    client = an_engine("https://engine.example.org:2376")
    assert run_container("train-light", catalog=CATALOG, client=client, mounts=mounts, override_image=PINNED).ok
    assert [each.source for each in caught["mounts"]] == ["/datasets/there"]
    assert caught["workdir"] == "/"


def test_a_result_that_is_not_well_says_how_it_ended_and_with_which_words(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any, hear: engine.Hear, **__: Any) -> engine.Ending:
        hear("stderr", b"CUDA out of luck\n")
        return engine.Ending(137, "out_of_memory", 3.0)

    monkeypatch.setattr(engine, "run", run)
    result = run_container("train-light", catalog=CATALOG, client=an_engine())
    with pytest.raises(ContainerError, match=r"container of train-light was ended by the kernel .* CUDA out of luck"):
        result.check()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("write /x: no space left on device", "the disk of Docker's engine is full"),
        ("pull access denied for lab/x", "the registry refuses"),
        ("manifest unknown", "the registry has no"),
        ("i/o timeout", "could not be pulled"),
    ],
)
def test_a_pull_that_fails_says_who_is_to_blame(words: str, told: str) -> None:
    assert told in pull._blame("lab/x@sha256:0", words)
    assert words in pull._blame("lab/x@sha256:0", words)


def test_a_pull_without_an_end_is_given_up_when_its_caller_ends() -> None:
    from docker.errors import ImageNotFound

    stop, told = threading.Event(), []

    def missing(_: str) -> None:
        raise ImageNotFound("none")

    def endless(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        while True:
            yield {"status": "Downloading", "id": "layer", "progressDetail": {"current": 1 << 20, "total": 3 << 20}}

    def tell(line: str) -> None:
        told.append(line)
        stop.set()

    client: Any = SimpleNamespace(api=SimpleNamespace(inspect_image=missing, pull=endless))
    digest = PINNED.partition("@")[2]
    with pytest.raises(ContainerError, match="was not pulled to its end: its caller has ended"):
        pull.bring(client, Container(asked=PINNED, image=PINNED, digest=digest), tell, stop)
    assert told == [f"pulling {PINNED}: 1 of 3 MiB"]
