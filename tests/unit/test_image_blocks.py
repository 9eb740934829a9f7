"""The blocks of containers: a team's catalog, a cluster's data, and Docker's engines and registries by name."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from prefect_docker import DockerHost, DockerRegistryCredentials  # type: ignore[import-untyped]
from pydantic import ValidationError

from nexa_infra.blocks import DataVolume, ImageCatalog, SlurmCluster
from nexa_infra.blocks.docker import credentials_of, docker_client
from nexa_infra.blocks.saved import saved_catalog
from nexa_infra.containers.catalog import load_catalog
from nexa_infra.errors import ConfigError, NexaError

if TYPE_CHECKING:
    from tests.conftest import PrefectServer

CATALOG = Path(__file__).resolve().parents[2] / "deployments" / "images" / "catalog.yaml"
ROW: dict[str, Any] = {"name": "train", "image": "registry.example.org/train:1.2"}
FULL: dict[str, Any] = {
    **ROW,
    "digest": "sha256:" + "a" * 64,
    "purpose": "what we train with",
    "command": ["python3", "train.py"],
    "health": ["nexa-health"],
    "env": [{"name": "A", "value": "1"}, {"name": "EMPTY"}],
    "mounts": [{"source": "/etc/site", "target": "/etc/site", "read_only": False}],
    "volumes": ["datasets"],
    "network": "host",
    "shm_size": "8G",
    "memory": "16G",
    "cpus": 2,
    "processes": 512,
}


def test_a_catalog_block_makes_the_plain_catalog_with_every_field() -> None:
    catalog = ImageCatalog(targets=[FULL], require_digest=True).to_catalog()

    assert catalog.require_digest
    assert catalog.targets["train"].model_dump() == {
        "image": "registry.example.org/train:1.2",
        "digest": "sha256:" + "a" * 64,
        "purpose": "what we train with",
        "command": ("python3", "train.py"),
        "health": ("nexa-health",),
        "env": {"A": "1", "EMPTY": ""},
        "mounts": ({"source": "/etc/site", "target": "/etc/site", "read_only": False},),
        "volumes": ("datasets",),
        "network": "host",
        "shm_size": "8G",
        "memory": "16G",
        "cpus": 2.0,
        "processes": 512,
    }


def test_a_catalog_block_read_from_the_project_s_catalog_is_that_catalog() -> None:
    assert ImageCatalog.from_yaml(CATALOG.read_text()).to_catalog() == load_catalog(CATALOG)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"targets": []}, "at least 1 item"),
        ({"targets": [ROW, ROW]}, "targets: 'train' stands twice: keep one of the two"),
        ({"targets": [{**ROW, "shm_size": "big"}]}, "targets.train.shm_size: 'big' is no size"),
        ({"targets": [{**ROW, "digest": "latest"}]}, "targets.train.digest: 'latest' is no digest"),
        ({"targets": [{**ROW, "env": [{"name": "A B", "value": ""}]}]}, "is no name for an environment variable"),
        ({"targets": [{**ROW, "cpus": 0}]}, "targets.train.cpus: '0.0' is no number of cores"),
        ({"targets": [{**ROW, "imgae": "x"}]}, "imgae"),
        ({"targets": [ROW], "tragets": []}, "there is no field 'tragets' (did you mean 'targets'?)"),
    ],
)
def test_a_catalog_block_says_what_is_wrong(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ImageCatalog(**fields)
    assert expected in str(caught.value)


def test_a_catalog_s_yaml_is_complained_of_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"the image catalog:2: targets.a.imgae: there is no such key"):
        ImageCatalog.from_yaml("targets:\n  a: {imgae: x}\n")


def test_the_catalog_block_shows_what_it_is_and_has_a_place_for_each_field() -> None:
    schema = ImageCatalog.model_json_schema()

    assert ImageCatalog.get_description()
    assert str(ImageCatalog._logo_url).startswith("https://")
    assert str(ImageCatalog._documentation_url).startswith("https://")
    assert schema["required"] == ["targets"]
    rows = schema["definitions"]["ImageTarget"]["properties"]
    assert [field["position"] for field in rows.values()] == list(range(len(rows)))
    assert [name for name, field in rows.items() if not field.get("description")] == []


def test_a_cluster_block_says_which_data_containers_may_see() -> None:
    block = SlurmCluster(
        workdir="/s",
        volumes=[DataVolume(name="imagenet", path="/data/imagenet")],
        allowed_mounts=["/data", "/scratch "],
    )

    cluster = block.to_cluster("hpc")

    assert cluster.volumes == {"imagenet": "/data/imagenet"}
    assert cluster.allowed_mounts == ("/data", "/scratch")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"volumes": [{"name": "a b", "path": "/x"}]}, "'a b' is no volume's name"),
        ({"volumes": [{"name": "a", "path": "x"}]}, "'x' is no absolute path"),
        ({"volumes": [{"name": "a", "path": "/x"}] * 2}, "'a' stands twice: keep one of the two"),
        ({"allowed_mounts": ["/data/../etc"]}, "'/data/../etc' is no absolute path"),
    ],
)
def test_a_cluster_block_says_which_data_it_does_not_understand(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SlurmCluster(workdir="/s", **fields)
    assert expected in str(caught.value)


def test_an_engine_that_is_not_there_is_named_with_what_to_do(tmp_path: Path) -> None:
    host = DockerHost(base_url=f"unix://{tmp_path}/no.sock")

    with pytest.raises(NexaError) as caught:
        docker_client(host)

    assert f"the Docker engine cannot be reached (unix://{tmp_path}/no.sock)" in str(caught.value)
    assert "is it running" in str(caught.value)


class Engine(BaseHTTPRequestHandler):
    """As much of Docker's API as a client asks for when it logs in."""

    logins: list[dict[str, str]]

    def do_GET(self) -> None:
        self._answer(200, {"ApiVersion": "1.41"} if self.path.endswith("/version") else "OK")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        login = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.logins.append(login)
        if login["password"] == "open sesame":
            self._answer(200, {"Status": "Login Succeeded"})
        else:
            self._answer(401, {"message": f"unauthorized: not {login['password']}"})

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[DockerHost]:
    """An engine on the loopback, and no login of a person's own."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Engine.logins = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield DockerHost(base_url=f"tcp://127.0.0.1:{server.server_port}")
        server.shutdown()


def login(password: str = "open sesame") -> DockerRegistryCredentials:
    return DockerRegistryCredentials(
        username="ada", password=password, registry_url="https://registry.example.org:5000/v2/"
    )


def test_a_client_is_logged_in_to_the_registry(engine: DockerHost) -> None:
    client = docker_client(engine, login())
    client.close()

    [sent] = Engine.logins
    assert (sent["username"], sent["password"], sent["serveraddress"]) == (
        "ada",
        "open sesame",
        "registry.example.org:5000",
    )


def test_a_refused_login_names_the_registry_and_shows_no_password(engine: DockerHost) -> None:
    with pytest.raises(NexaError) as caught:
        docker_client(engine, login("hush"))

    assert "the registry registry.example.org:5000 refuses the login of 'ada'" in str(caught.value)
    assert "unauthorized" in str(caught.value)
    assert "hush" not in str(caught.value)


def test_credentials_hold_the_registry_as_an_image_s_name_has_it() -> None:
    found = credentials_of(login())

    assert (found.registry, found.username, found.password) == ("registry.example.org:5000", "ada", "open sesame")
    assert "open sesame" not in repr(found)


@pytest.mark.server
def test_saved_blocks_are_found_by_name_and_the_nearest_is_named(
    prefect_server: PrefectServer, engine: DockerHost
) -> None:
    engine.save("gpu-box", overwrite=True)
    login().save("team-registry", overwrite=True)
    saved = ImageCatalog(targets=[FULL])
    saved.save("ours", overwrite=True)

    docker_client("gpu-box", "docker-registry-credentials/team-registry").close()
    assert credentials_of("team-registry").password == "open sesame"
    assert saved_catalog("ours") == saved.to_catalog()

    assert [each["username"] for each in Engine.logins] == ["ada"]
    with pytest.raises(ConfigError, match=r"there is no saved Docker host 'gpu-bix' \(did you mean 'gpu-box'\?\)"):
        docker_client("gpu-bix")
    with pytest.raises(ConfigError, match=r"did you mean 'team-registry'\?"):
        credentials_of("team-registy")
    with pytest.raises(ConfigError, match=r"there is no saved image catalog 'our' \(did you mean 'ours'\?\)"):
        saved_catalog("our")
    with pytest.raises(ConfigError, match="'docker-host/ours' is no image catalog: write image-catalog/NAME"):
        saved_catalog("docker-host/ours")
