"""From what is asked for to a container that stays the same; and what is told where it makes no sense."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.containers import credentials
from nexa_infra.containers.catalog import Catalog
from nexa_infra.containers.chosen import container_of
from nexa_infra.containers.credentials import Credentials, remember
from nexa_infra.containers.mounts import merged, mounts_of
from nexa_infra.containers.pin import pin
from nexa_infra.errors import ConfigError, ContainerError
from nexa_infra.hosts.base import Completed
from nexa_infra.hosts.local import LocalHost
from nexa_infra.runs.record import Container, Price, Run
from nexa_infra.scheduling.needs import container_check, runtime_check
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.container import ContainerSettings, ContainerSpec
from nexa_infra.spec.load import read_config
from nexa_infra.spec.run import SweepConfig
from tests.unit.little_server import Answer, Asked, Server

DIGEST = f"sha256:{'ab' * 32}"
OTHER = f"sha256:{'cd' * 32}"
CLUSTER = Cluster(
    name="deep",
    host="login1",
    workdir="/scratch/ada",
    runtime="apptainer",
    volumes={"imagenet": "/data/imagenet", "coco": "/data/coco"},
    allowed_mounts=("/data", "/scratch/ada/"),
)


@dataclass
class Site(LocalHost):
    """A login node on this machine, that takes itself for another."""

    name = "ada@login1"
    remote = True

    def script(self, text: str, *, timeout: float | None = None) -> Completed:
        done = subprocess.run(["sh"], input=text, capture_output=True, text=True, timeout=timeout, check=False)
        return Completed(("sh",), done.returncode, done.stdout, done.stderr)


@pytest.fixture(autouse=True)
def nobody_knows_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to be in, a home without logins, no engine, and a process that was given no login."""
    monkeypatch.setattr(credentials, "_REMEMBERED", {})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def registry() -> Iterator[Server]:
    """A registry whose every tag stands for one digest."""

    def answer(asked: Asked) -> Answer:
        digest = asked.path.rpartition("/")[2]
        return 200, {"Docker-Content-Digest": digest if digest.startswith("sha256:") else DIGEST}, b""

    server = Server(answer)
    yield server
    server.close()


def spec(**asked: Any) -> ContainerSpec:
    return ContainerSpec.model_validate(asked)


def settings(**asked: Any) -> ContainerSettings:
    return ContainerSettings.model_validate(asked)


def catalog(*, require_digest: bool = False, **targets: Any) -> Catalog:
    return Catalog.model_validate({"require_digest": require_digest, "targets": targets})


def pinned(asked: ContainerSpec, cluster: Cluster | None = CLUSTER, **more: Any) -> Container:
    found = pin(asked, Site() if cluster else LocalHost(), cluster=cluster, **more)
    assert found is not None
    return found


def refusal(asked: ContainerSpec, cluster: Cluster | None = CLUSTER, **more: Any) -> str:
    with pytest.raises((ConfigError, ContainerError)) as caught:
        pin(asked, Site() if cluster else LocalHost(), cluster=cluster, **more)
    return str(caught.value).removeprefix("config: ")


# -- a config over its target


def test_a_config_s_word_stands_over_its_target_s_and_what_both_name_is_joined() -> None:
    under = settings(
        env={"A": "target", "B": "target"},
        mounts=[{"source": "/data/a", "target": "/a"}, {"source": "/data/b", "target": "/b"}],
        volumes=["imagenet", "coco"],
        network="host", shm_size="8G", memory="16G", cpus=2, processes=100,
    )  # fmt: skip
    over = settings(
        env={"B": "config", "C": "config"},
        mounts=[{"source": "/data/mine", "target": "/b", "read_only": False}],
        volumes=["coco", "mine"],
        network="none", shm_size="1G",
    )  # fmt: skip
    assert merged(under, over) == settings(
        env={"A": "target", "B": "config", "C": "config"},
        mounts=[
            {"source": "/data/a", "target": "/a"},
            {"source": "/data/mine", "target": "/b", "read_only": False},
        ],
        volumes=["imagenet", "coco", "mine"],
        network="none", shm_size="1G", memory="16G", cpus=2, processes=100,
    )  # fmt: skip
    assert merged(None, over) == over
    assert merged(under, settings()) == under


# -- mounts


def seen(cluster: Cluster | None = CLUSTER, **asked: Any) -> list[tuple[str, str, bool]]:
    return [(each.source, each.target, each.read_only) for each in mounts_of(settings(**asked), cluster)]


def forbidden(cluster: Cluster | None = CLUSTER, **asked: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        mounts_of(settings(**asked), cluster)
    return str(caught.value).removeprefix("config: ")


def test_a_volume_is_seen_read_only_under_its_name() -> None:
    assert seen(volumes=["coco"], mounts=[{"source": "/data/x", "target": "/x", "read_only": False}]) == [
        ("/data/x", "/x", False),
        ("/data/coco", "/data/coco", True),
    ]


def test_a_volume_that_is_not_known_is_told_with_the_nearest_name() -> None:
    assert forbidden(volumes=["imagnet"]) == (
        "container.volumes: the cluster deep knows no volume 'imagnet' (did you mean 'imagenet'?): "
        "there are coco, imagenet"
    )
    bare = CLUSTER.model_copy(update={"volumes": {}})
    assert forbidden(bare, volumes=["coco"]) == (
        "container.volumes: the cluster deep knows no volume 'coco': it has none: mount a folder (container.mounts), "
        "or name it under volumes in the cluster's block"
    )
    assert forbidden(None, volumes=["coco"]) == (
        "container.volumes: this machine knows no volume 'coco': it has none: mount a folder (container.mounts)"
    )


@pytest.mark.parametrize("again", ["/data/coco", "/data/coco/", "//data/coco", "/data/./coco"])
def test_a_place_is_taken_once(again: str) -> None:
    told = forbidden(volumes=["coco"], mounts=[{"source": "/data/mine", "target": again}])
    assert told == "container.mounts: /data/coco is taken twice, by /data/mine and /data/coco: change one target"


def test_the_container_s_scratch_is_its_own() -> None:
    told = forbidden(mounts=[{"source": "/data/mine", "target": "/scratch/"}])
    assert told == (
        "container.mounts: /data/mine is to be seen as /scratch, the container's scratch folder: choose another target"
    )


@pytest.mark.parametrize("source", ["/data", "/data/", "/data/x", "/scratch/ada", "/scratch/ada/run", "~/x"])
def test_what_a_cluster_allows_is_mounted(source: str) -> None:
    """Where a home lies only the cluster knows."""
    assert seen(mounts=[{"source": source, "target": "/x"}]) == [(source, "/x", True)]


@pytest.mark.parametrize("source", ["/data2", "/data2/x", "/dat", "/", "/scratch", "/scratch/adam", "/etc", "//data"])
def test_what_lies_beside_what_a_cluster_allows_is_not(source: str) -> None:
    assert forbidden(mounts=[{"source": source, "target": "/x"}]) == (
        f"container.mounts: {source} lies outside what the cluster deep lets containers mount: /data, /scratch/ada/"
    )


@pytest.mark.parametrize("source", ["/data/../etc", "/data/..", "data", "~ada/x", ""])
def test_a_path_that_leads_up_or_from_nowhere_is_never_read(source: str) -> None:
    with pytest.raises(ValueError, match=r"is no absolute path|leads up by"):
        settings(mounts=[{"source": source, "target": "/x"}])


def test_where_a_cluster_says_nothing_everything_is_allowed_and_so_on_this_machine() -> None:
    free = CLUSTER.model_copy(update={"allowed_mounts": ()})
    for cluster in (free, None):
        assert seen(cluster, mounts=[{"source": "/etc", "target": "/x"}]) == [("/etc", "/x", True)]


# -- where links lead, asked where it is known


def a_run(container: Container, cluster: Cluster | None) -> Run:
    config = {
        "job": {"name": "t"},
        "launcher": {"type": "command", "command": ["true"]},
        "sweep": {"parameters": {"n": [1]}},
    }
    price = Price(item="cpu", unit="core-hour", usd_per_hour=Decimal(0), provider="p", source="s", date="2026-01-01")
    return Run(
        id="r", config=SweepConfig.model_validate(config), directory="/r", workdir="/w", cluster=cluster, price=price,
        container=container, created_at=datetime.now(UTC),
    )  # fmt: skip


def checked(text: str, **env: str) -> str:
    done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, env={**os.environ, **env}, check=True)
    assert done.stderr == ""
    return done.stdout


def lacking(source: Path | str, *allowed: Path, **volumes: Path) -> str:
    cluster = CLUSTER.model_copy(
        update={
            "allowed_mounts": tuple(str(each) for each in allowed),
            "volumes": {name: str(path) for name, path in volumes.items()},
        }
    )
    asked = settings(mounts=[{"source": str(source), "target": "/x"}], volumes=list(volumes))
    container = Container(
        asked="i", image=f"r.org/i@{DIGEST}", digest=DIGEST, settings=asked, mounts=mounts_of(asked, cluster)
    )
    return checked(container_check(a_run(container, cluster)))


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """An allowed folder with a hostile name, and another beside it."""
    allowed, beside = tmp_path / "CLUSTER's $(data) [a]*", tmp_path / "CLUSTER's $(data) [a]*2"
    for folder in (allowed, beside):
        (folder / "set").mkdir(parents=True)
    return allowed, beside


def test_what_lies_where_it_says_may_be_mounted(places: tuple[Path, Path], tmp_path: Path) -> None:
    allowed, _ = places
    assert lacking(allowed, allowed) == lacking(allowed / "set", allowed) == lacking("~/" + allowed.name, allowed) == ""
    assert lacking(allowed, Path("/")) == ""
    # An allowed folder may be a link itself, as /home and /scratch are on many clusters.
    (tmp_path / "work").symlink_to(allowed)
    assert lacking(tmp_path / "work" / "set", tmp_path / "work") == ""
    (allowed / "inside").symlink_to("set")
    assert lacking(allowed / "inside", allowed) == ""


def test_a_link_out_of_what_a_cluster_allows_is_refused(places: tuple[Path, Path]) -> None:
    allowed, beside = places
    (allowed / "out").symlink_to(beside)
    (allowed / "up").symlink_to("..")
    told = f"container.mounts: {{}} leads to {{}}, outside what the cluster deep lets containers mount: {allowed}\n"
    assert lacking(allowed / "out", allowed) == told.format(allowed / "out", beside)
    assert lacking(allowed / "out" / "set", allowed) == told.format(allowed / "out/set", beside / "set")
    assert lacking(allowed / "up", allowed) == told.format(allowed / "up", allowed.parent)
    assert lacking("~/" + beside.name, allowed) == told.format(beside, beside)
    line_end = beside.with_name(allowed.name + "\n")
    line_end.mkdir()
    (allowed / "newline").symlink_to(line_end)
    assert "leads to" in lacking(allowed / "newline", allowed)


def test_a_volume_is_the_cluster_s_own_word_wherever_it_lies(places: tuple[Path, Path]) -> None:
    allowed, beside = places
    assert lacking(allowed, allowed, data=beside) == ""


def test_a_source_that_is_not_there_is_told_once(places: tuple[Path, Path]) -> None:
    allowed, _ = places
    (allowed / "dangling").symlink_to("/nowhere/at/all")
    for name in ("missing", "dangling"):
        told = lacking(allowed / name, allowed)
        assert told.startswith(f"container.mounts: {allowed / name} is not there, asked on ")
        assert told.endswith(": make it, or name another\n") and told.count("\n") == 1


def test_a_login_that_others_may_read_is_told(tmp_path: Path) -> None:
    login = tmp_path / "my config.json"
    container = Container(asked="i", image="i", digest=DIGEST, auth_file="~/my config.json")
    check = container_check(a_run(container, None))
    assert checked(check).startswith(f"container.auth_file: {login} is not there, asked on ")
    login.touch(0o600)
    assert checked(check) == ""
    login.chmod(0o640)
    assert checked(check) == f"container.auth_file: {login} has mode 640: chmod 600 it\n"


def test_what_runs_the_container_and_is_not_there_is_named_with_the_machine(tmp_path: Path) -> None:
    container = Container(asked="i", image="i", digest=DIGEST, runtime="singularity")
    (tmp_path / "hostname").write_text("#!/bin/sh\necho n7\n")
    (tmp_path / "hostname").chmod(0o755)
    run = a_run(container, None)
    told = subprocess.run(
        ["/bin/sh", "-c", runtime_check(run)], capture_output=True, text=True, env={"PATH": str(tmp_path)}, check=True
    ).stdout
    assert told == "singularity is not installed on n7: install it, or set container.runtime\n"
    assert runtime_check(run.model_copy(update={"container": None})) == "true"
    assert container_check(run.model_copy(update={"container": None})) == "true"


# -- the image


def test_a_tag_is_resolved_once_and_the_digest_is_what_runs(registry: Server) -> None:
    image = f"{registry.host}/lab/train:1.2"
    found = pinned(spec(image=image, volumes=["coco"], env={"A": "1"}, auth_file="~/login.json"))
    assert found == Container(
        asked=image,
        image=f"{registry.host}/lab/train@{DIGEST}",
        digest=DIGEST,
        source="registry",
        runtime="apptainer",
        settings=settings(volumes=["coco"], env={"A": "1"}),
        mounts=mounts_of(settings(volumes=["coco"]), CLUSTER),
        auth_file="~/login.json",
    )
    assert len(registry.asked) == 1


def test_a_target_s_own_digest_is_what_runs_and_another_image_has_its_own(registry: Server) -> None:
    known = catalog(train={"image": f"{registry.host}/train:1", "digest": OTHER, "env": {"A": "1"}})
    found = pinned(spec(target="train"), catalog=known)
    assert (found.target, found.image, found.digest) == ("train", f"{registry.host}/train@{OTHER}", OTHER)
    found = pinned(spec(target="train", image=f"{registry.host}/mine:2"), catalog=known)
    assert (found.target, found.image, found.digest) == ("train", f"{registry.host}/mine@{DIGEST}", DIGEST)
    assert found.settings.env == {"A": "1"}


def test_where_a_catalog_demands_a_digest_a_tag_is_not_enough(registry: Server) -> None:
    host = registry.host
    known = catalog(
        require_digest=True, free={"image": f"{host}/free:1"}, train={"image": f"{host}/train:1", "digest": OTHER}
    )
    assert "targets.free: has no digest, and the catalog demands one (require_digest): push" in refusal(
        spec(target="free"), catalog=known
    )
    for image, name in [
        (f"{host}/mine:2", f"{host}/mine"), (f"{host}/mine", f"{host}/mine"), ("alpine", "docker.io/library/alpine"),
    ]:  # fmt: skip
        for target in ("train", "free"):
            assert refusal(spec(target=target, image=image), catalog=known) == (
                f"container.image: {image} has no digest, and the catalog demands one: write {name}@sha256:…"
            )
    assert registry.asked == []
    assert pinned(spec(target="train"), catalog=known).digest == OTHER
    assert pinned(spec(target="free", image=f"{host}/mine@{OTHER}"), catalog=known).digest == OTHER


def test_a_target_that_is_not_known_is_told_with_the_nearest_name() -> None:
    known = catalog(train={"image": "r.example.org/t:1"}, infer={"image": "r.example.org/i:1"})
    assert refusal(spec(target="trian"), catalog=known).endswith(
        "targets: there is no target 'trian' (did you mean 'train'?); there are infer, train"
    )


def test_an_image_that_makes_no_sense_is_told_so() -> None:
    assert refusal(spec(image="Lab/Train")) == (
        "container.image: 'Lab/Train' is no image: names are in small letters, lab/train"
    )


def test_a_registry_that_is_not_there_is_needed_only_for_a_tag() -> None:
    told = refusal(spec(image="127.0.0.1:9/train:1"))
    assert told.startswith("the registry 127.0.0.1:9 does not answer from this machine")
    assert "name the image by its digest, 127.0.0.1:9/train@sha256:…, or try again" in told
    assert pinned(spec(image=f"127.0.0.1:9/train:1@{DIGEST}")).image == f"127.0.0.1:9/train@{DIGEST}"


def test_a_login_that_this_process_was_given_is_used_and_not_kept_in_what_is_pinned(registry: Server) -> None:
    login = f"Basic {base64.b64encode(b'ada:hush').decode()}"
    open_answer = registry.answer
    registry.answer = lambda asked: (
        open_answer(asked) if asked.login == login else (401, {"WWW-Authenticate": 'Basic realm="lab"'}, b"")
    )
    image = f"{registry.host}/train:1"
    assert "it refuses to be asked without a login" in refusal(spec(image=image))
    remember(Credentials(f"https://{registry.host}", "ada", "hush"))
    found = pinned(spec(image=image))
    assert found.digest == DIGEST
    assert "hush" not in found.model_dump_json() and "ada" not in found.model_dump_json()


# -- what runs it


def test_none_runs_trials_as_they_are_and_nothing_is_asked(registry: Server) -> None:
    asked = spec(image=f"{registry.host}/train:1", runtime="none")
    assert pin(asked, Site(), cluster=CLUSTER) is None
    assert pin(asked, LocalHost()) is None
    assert pin(asked, Site(), cluster=CLUSTER.model_copy(update={"runtime": "none"})) is None
    assert registry.asked == []


def test_a_cluster_without_containers_is_told_with_what_to_do() -> None:
    assert refusal(spec(image="train"), CLUSTER.model_copy(update={"runtime": "none"})) == (
        "container: the cluster deep runs no containers (its runtime is none): remove the key, set container.runtime: "
        "none to run the trials as they are, or set the cluster's runtime"
    )


def test_a_config_s_runtime_stands_over_the_cluster_s(registry: Server) -> None:
    image = f"{registry.host}/train:1"
    assert pinned(spec(image=image)).runtime == "apptainer"
    assert pinned(spec(image=image, runtime="docker")).runtime == "docker"
    assert pinned(spec(image=image), None, here=False).runtime == "auto"


def test_where_srun_knows_pyxis_auto_is_pyxis(
    registry: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    automatic = CLUSTER.model_copy(update={"runtime": "auto"})
    image = f"{registry.host}/train:1"
    (tmp_path / "srun").write_text("#!/bin/sh\necho ' --container-image=IMAGE'\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert pinned(spec(image=image), automatic).runtime == "pyxis"
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 1\n")
    assert pinned(spec(image=image), automatic).runtime == "auto"


def test_pyxis_cannot_write_every_path() -> None:
    told = refusal(spec(image="train", runtime="pyxis", mounts=[{"source": "/data/a,b", "target": "/x"}]))
    assert told == (
        "container.mounts: /data/a,b holds a comma or a colon, which Pyxis has no way to write: choose a path without"
    )


def test_what_is_not_installed_here_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal(spec(image="train", runtime="apptainer"), None) == (
        "apptainer is not installed on this machine: install it, or choose another runtime"
    )
    told = refusal(spec(image="train"), None)
    assert told.startswith(
        "nothing on this machine runs containers: install Docker, or Apptainer, or set container.runtime: none; "
        f"Docker's engine does not answer at unix://{tmp_path}/no.sock"
    )


# -- files


IMAGE = b'{"architecture": "amd64", "rootfs": {"type": "layers"}}'


def an_archive(path: Path, config: Any = "config.json", *, holds: str | None = None, manifest: bool = True) -> Path:
    """Write what `docker save` writes, as far as it is read; `holds` is what the configuration is called in it."""
    listed = json.dumps([{"Config": config, "RepoTags": ["train:1"], "Layers": []}]).encode()
    with tarfile.open(path, "w") as archive:
        for name, data in [(holds or str(config), IMAGE), *([("manifest.json", listed)] if manifest else [])]:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def test_a_sif_is_known_by_its_content(tmp_path: Path) -> None:
    sif = tmp_path / "it's $(mine).sif"
    sif.write_bytes(b"a SIF")
    (tmp_path / "link.sif").symlink_to(sif.name)
    found = pinned(spec(image=str(tmp_path / "link.sif")))
    state = sif.stat()
    digest = f"sha256:{hashlib.sha256(b'a SIF').hexdigest()}"
    assert (found.image, found.file, found.digest, found.source) == (str(sif), str(sif), digest, "sif")
    assert found.stamp == f"{state.st_size} {int(state.st_mtime)}"
    assert pinned(spec(image="~/link.sif")).file == str(sif)
    assert pinned(spec(image="link.sif"), None, here=False).file == str(sif), "from the folder that one is in"


def test_an_archive_is_known_by_its_image_s_configuration_whatever_that_is_called(tmp_path: Path) -> None:
    digest = f"sha256:{hashlib.sha256(IMAGE).hexdigest()}"
    for config in ("ab" * 32 + ".json", "blobs/sha256/" + "cd" * 32, "it's -v.json"):
        archive = an_archive(tmp_path / "train.tar", config)
        found = pinned(spec(image=f"docker-archive:{archive}"))
        assert (found.image, found.digest, found.file, found.source) == (digest, digest, str(archive), "archive")


@pytest.mark.parametrize("config", ["not there.json", "", 7, None])
def test_an_archive_without_its_image_s_configuration_is_none(config: Any, tmp_path: Path) -> None:
    an_archive(tmp_path / "train.tar", config, holds="other.json")
    assert "train.tar is no archive of `docker save`" in refusal(spec(image=str(tmp_path / "train.tar")))


def test_an_archive_s_own_words_are_no_options_of_tar(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for config in (f"--to-command=touch {mark}", f"--use-compress-program=touch {mark}", "-h"):
        an_archive(tmp_path / "train.tar", config, holds="other.json")
        assert "no archive of `docker save`" in refusal(spec(image=str(tmp_path / "train.tar")))
    assert not mark.exists()


def test_a_file_that_is_not_there_or_is_something_else_is_told(tmp_path: Path) -> None:
    def told(name: str, cluster: Cluster | None = CLUSTER, **more: Any) -> str:
        return refusal(spec(image=str(tmp_path / name)), cluster, **more).replace(f"{tmp_path}/", "")

    assert told("no.sif") == "container.image: no.sif is not there, on ada@login1"
    assert told("no.tar", None, here=False) == "container.image: no.tar is not there, on this machine"
    (tmp_path / "folder.sif").mkdir()
    assert told("folder.sif") == "container.image: folder.sif is not there, on ada@login1"
    (tmp_path / "text.tar").write_text("no archive\n")
    assert told("text.tar").startswith("container.image: text.tar is no archive of `docker save`: tar: ")
    an_archive(tmp_path / "other.tar", manifest=False)
    assert "other.tar is no archive of `docker save`: tar: manifest.json: Not found" in told("other.tar")
    (tmp_path / "lines.tar").write_bytes(an_archive(tmp_path / "good.tar").read_bytes()[:600])
    assert "lines.tar is no archive of `docker save`" in told("lines.tar")


def test_a_file_on_a_cluster_is_named_by_its_whole_path() -> None:
    assert refusal(spec(image="train.sif")) == (
        "container.image: train.sif is a file on ada@login1, whose folder is not known: write its absolute path"
    )


@pytest.mark.parametrize(
    ("name", "runtime", "told"),
    [
        ("t.sif", "docker", "is a SIF, which docker does not run: set container.runtime: apptainer"),
        ("t.sif", "pyxis", "is a SIF, which pyxis does not run: set container.runtime: apptainer"),
        ("t.sqsh", "docker", "is a squashfs image of enroot, which docker does not run: set container.runtime: pyxis"),
        ("t.tar", "pyxis", "is an archive, which Pyxis does not run: push it to a registry"),
    ],
)  # fmt: skip
def test_a_file_that_its_runtime_does_not_run_is_told(name: str, runtime: str, told: str, tmp_path: Path) -> None:
    an_archive(tmp_path / name)
    assert refusal(spec(image=str(tmp_path / name), runtime=runtime)) == f"container.image: {tmp_path / name} {told}"


# -- each complaint at its key

CONFIG = """\
launcher: {type: command, command: ["true"]}
sweep: {parameters: {n: [1, 2]}}
container:
  image: IMAGE
  volumes: [cocoa]
"""


def told_of(text: str, cluster: Cluster | None = CLUSTER) -> str:
    Path("t.yaml").write_text(text)
    config = read_config("t.yaml")
    with pytest.raises((ConfigError, ContainerError)) as caught:
        container_of(config, Path("t.yaml"), cluster)
    return str(caught.value)


def test_a_complaint_stands_at_its_line_and_key() -> None:
    assert told_of(CONFIG) == (
        "t.yaml:5: container.volumes: the cluster deep knows no volume 'cocoa' (did you mean 'coco'?): "
        "there are coco, imagenet"
    )
    text = CONFIG.replace("  volumes: [cocoa]\n", "").replace("IMAGE", "Train")
    assert told_of(text) == "t.yaml:4: container.image: 'Train' is no image: names are in small letters, train"
    text = CONFIG.replace("volumes: [cocoa]", "mounts:\n  - {source: /etc, target: /x}")
    assert told_of(text) == (
        "t.yaml:5: container.mounts: /etc lies outside what the cluster deep lets containers mount: "
        "/data, /scratch/ada/"
    )


def test_a_target_of_no_catalog_is_told_where_it_was_looked_for(tmp_path: Path) -> None:
    text = CONFIG.replace("image: IMAGE", "target: trian").replace("  volumes: [cocoa]\n", "")
    assert told_of(text) == (
        f"t.yaml:4: container.target: there is no image catalog: {tmp_path}/deployments/images/catalog.yaml is not "
        "there; name one (container.catalog, NEXA_CATALOG)"
    )
    Path("deployments/images").mkdir(parents=True)
    Path("deployments/images/catalog.yaml").write_text("targets: {train: {image: 'r.example.org/t:1'}}\n")
    assert told_of(text) == (
        "t.yaml:4: container.target: there is no target 'trian' (did you mean 'train'?); there are train"
    )


def test_an_image_that_cannot_be_had_is_told_at_its_key() -> None:
    text = CONFIG.replace("IMAGE", "127.0.0.1:9/train:1").replace("  volumes: [cocoa]\n", "")
    assert told_of(text).startswith("container.image: the registry 127.0.0.1:9 does not answer from this machine")
