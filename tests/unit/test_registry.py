"""What a registry is asked and told, over real HTTP: and to whom a password goes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.containers import credentials
from nexa_infra.containers.credentials import Credentials, remember
from nexa_infra.containers.images import parse_reference
from nexa_infra.containers.registry import RegistryUnreachableError, is_loopback, resolve
from nexa_infra.errors import ContainerError
from tests.unit.little_server import Answer, Asked, Server

MANIFEST = b'{"schemaVersion": 2, "layers": []}'
DIGEST = f"sha256:{hashlib.sha256(MANIFEST).hexdigest()}"
OTHER = f"sha256:{'0' * 64}"
NAMED = {"Docker-Content-Digest": DIGEST}
PASSWORD = "h u:s\u00e9"
BASIC = f"Basic {base64.b64encode(f'ada:{PASSWORD}'.encode()).decode()}"


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Asked], Answer]], Server]]:
    """Make servers on the loopback."""
    running: list[Server] = []

    def start(answer: Callable[[Asked], Answer]) -> Server:
        running.append(Server(answer))
        return running[-1]

    yield start
    for each in running:
        each.close()


@pytest.fixture(autouse=True)
def nobody_knows_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without logins, and a process that was given none."""
    monkeypatch.setattr(credentials, "_REMEMBERED", {})
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DOCKER_CONFIG", "NETRC", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def manifest(_: Asked) -> Answer:
    return 200, NAMED, MANIFEST


def refusal(host: str, name: str = "lab/train:1.2") -> str:
    with pytest.raises(ContainerError) as caught:
        resolve(parse_reference(f"{host}/{name}"))
    return str(caught.value)


def log_in(host: str) -> None:
    remember(Credentials(host, "ada", PASSWORD))


def test_an_open_registry_says_what_a_tag_stands_for_now(serve: Any) -> None:
    server = serve(manifest)
    assert resolve(parse_reference(f"{server.host}/lab/train:1.2")) == DIGEST
    assert server.asked == [Asked("HEAD", "/v2/lab/train/manifests/1.2", None)]


def test_a_digest_that_is_given_is_looked_up(serve: Any) -> None:
    server = serve(manifest)
    assert resolve(parse_reference(f"{server.host}/train:1.2@{DIGEST}")) == DIGEST
    assert server.asked[0].path == f"/v2/train/manifests/{DIGEST}"


def test_a_login_is_shown_only_where_it_is_asked_for(serve: Any) -> None:
    server = serve(manifest)
    log_in(server.host)
    assert resolve(parse_reference(f"{server.host}/train")) == DIGEST
    assert server.logins == {None}


def basic(asked: Asked) -> Answer:
    if asked.login != BASIC:
        return 401, {"WWW-Authenticate": 'Basic realm="lab"'}, b"no"
    return manifest(asked)


def test_a_registry_that_asks_for_a_password_is_told_it(serve: Any) -> None:
    server = serve(basic)
    assert refusal(server.host) == (
        f"the registry {server.host} refuses {server.host}/lab/train:1.2 (401): it refuses to be asked without a "
        f"login, or has no image of this name; give a registry block that may read it, or run "
        f"`docker login {server.host}`"
    )
    log_in(server.host)
    assert resolve(parse_reference(f"{server.host}/train")) == DIGEST


def test_what_docker_login_has_kept_is_used_and_a_block_s_login_stands_over_it(
    serve: Any, nobody_knows_us: Path
) -> None:
    server = serve(basic)
    kept = {"auths": {server.host: {"auth": base64.b64encode(f"ada:{PASSWORD}".encode()).decode()}}}
    (nobody_knows_us / ".docker").mkdir()
    (nobody_knows_us / ".docker" / "config.json").write_text(json.dumps(kept))
    assert resolve(parse_reference(f"{server.host}/train")) == DIGEST
    remember(Credentials(f"http://{server.host}/", "ada", "wrong"))
    told = refusal(server.host)
    assert "(401): it refuses the login of ada, or has no image of this name" in told
    assert "wrong" not in told


def test_a_token_is_fetched_where_the_registry_says_with_the_scope_that_it_names(serve: Any) -> None:
    def token(asked: Asked) -> Answer:
        if asked.path.startswith("/token?"):
            return (200, {}, b'{"token": "t.o-k"}') if asked.login == BASIC else (401, {}, b"no")
        if asked.login != "Bearer t.o-k":
            realm = f'Bearer realm="http://{server.host}/token",service="lab",scope="repository:lab/train:pull,push"'
            return 401, {"WWW-Authenticate": realm}, b"no"
        return manifest(asked)

    server: Server = serve(token)
    assert "(401): it refuses to be asked without a login" in refusal(server.host)
    server.asked.clear()
    log_in(server.host)
    assert resolve(parse_reference(f"{server.host}/lab/train:1.2")) == DIGEST
    assert server.asked == [
        Asked("HEAD", "/v2/lab/train/manifests/1.2", None),
        Asked("GET", "/token?service=lab&scope=repository%3Alab%2Ftrain%3Apull%2Cpush", BASIC),
        Asked("HEAD", "/v2/lab/train/manifests/1.2", "Bearer t.o-k"),
    ]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((200, {}, b"not JSON"), "answers with no token"),
        ((200, {}, b'["a list"]'), "answers with no token"),
        ((200, {}, b'{"token": "a\\nline: b"}'), "answers with no token"),
        ((200, {}, b'{"token": 7}'), "answers with no token"),
        ((404, {}, b"nothing\x1b[31m here"), "answers with 404, nothing [31m here"),
        ((503, {}, b"busy"), "answers with 503, busy"),
    ],
)
def test_who_gives_no_token_is_told_apart_from_a_registry_that_has_no_image(
    answer: Answer, told: str, serve: Any
) -> None:
    def token(asked: Asked) -> Answer:
        if asked.path.startswith("/token"):
            return answer
        return 401, {"WWW-Authenticate": f'Bearer realm="http://{server.host}/token"'}, b""

    server: Server = serve(token)
    said = refusal(server.host)
    assert f"{server.host}, which gives its tokens, {told}" in said
    assert said.startswith(f"the registry {server.host} does not answer from this machine")
    assert f"name the image by its digest, {server.host}/lab/train@sha256:…, or try again" in said


@pytest.mark.parametrize(
    "realm",
    ["http://auth.example.org/token", "http://127.evil.example.org/token", "ftp://127.0.0.1/token", "/token", "",
     "https://ada@auth.example.org/token"],
)  # fmt: skip
def test_a_password_is_sent_to_no_realm_where_others_could_read_it(
    realm: str, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = serve(lambda _: (200, {}, b'{"token": "t"}'))
    monkeypatch.setenv("http_proxy", f"http://{spy.host}")  # whatever leaves the machine is seen
    monkeypatch.setenv("no_proxy", "")
    server = serve(lambda _: (401, {"WWW-Authenticate": f'Bearer realm="{realm}"'}, b""))
    log_in(server.host)
    assert "where others can read it" in refusal(server.host)
    assert spy.asked == []
    assert server.logins == {None}


def test_a_password_for_the_loopback_goes_through_no_proxy(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = serve(lambda _: (502, {}, b""))
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://{proxy.host}")
    monkeypatch.setenv("no_proxy", "")
    server = serve(basic)
    log_in(server.host)
    resolve(parse_reference(f"{server.host}/train"))
    assert BASIC not in proxy.logins


def test_a_netrc_neither_replaces_a_token_nor_follows_a_redirect(serve: Any, nobody_knows_us: Path) -> None:
    def token(asked: Asked) -> Answer:
        if asked.path.startswith("/token"):
            return 200, {}, b'{"access_token": "tok"}'
        if asked.login != "Bearer tok":
            return 401, {"WWW-Authenticate": f'Bearer realm="http://{server.host}/token"'}, b""
        return 307, {"Location": f"http://{elsewhere.host}/blob"}, b""

    elsewhere = serve(manifest)
    server: Server = serve(token)
    netrc = nobody_knows_us / ".netrc"
    netrc.write_text("default login bob password secret\n")
    netrc.chmod(0o600)
    assert resolve(parse_reference(f"{server.host}/train")) == DIGEST
    assert server.logins == {None, "Bearer tok"}
    assert elsewhere.logins == {None}


def test_what_a_registry_leads_to_is_not_told_who_we_are(serve: Any) -> None:
    """Neither by its own challenge, nor by a realm of its own."""
    thief: Server = serve(manifest)
    server = serve(lambda _: (307, {"Location": f"http://{thief.host}/v2/x"}, b""))
    log_in(server.host)
    for scheme in ("Basic", "Bearer"):
        challenge = {"WWW-Authenticate": f'{scheme} realm="http://{thief.host}/token"'}
        thief.answer = lambda _, told=challenge: (401, told, b"")  # type: ignore[misc]
        assert "(401)" in refusal(server.host)
    assert {*thief.logins, *server.logins} == {None}
    assert {each.path for each in thief.asked} == {"/v2/x"}


def test_a_login_goes_along_with_a_redirect_on_the_registry_itself_only(serve: Any) -> None:
    def moved(asked: Asked) -> Answer:
        if asked.path.startswith("/v2/lab"):
            return 301, {"Location": "/v2/new/manifests/1.2"}, b""
        return basic(asked)

    server: Server = serve(moved)
    log_in(server.host)
    assert resolve(parse_reference(f"{server.host}/lab/train:1.2")) == DIGEST

    elsewhere = serve(manifest)
    server.answer = lambda asked: (
        (307, {"Location": f"http://{elsewhere.host}/x"}, b"") if asked.login else basic(asked)
    )
    assert resolve(parse_reference(f"{server.host}/lab/train:1.2")) == DIGEST
    assert elsewhere.logins == {None}


@pytest.mark.parametrize("place", ["http://example.org/x", "file:///etc/passwd", "//example.org/x"])
def test_a_registry_leads_to_nowhere_that_can_be_read_or_changed_on_the_way(place: str, serve: Any) -> None:
    server = serve(lambda _: (302, {"Location": place}, b""))
    assert "where others can change what is said" in refusal(server.host)


def test_a_registry_that_leads_in_a_circle_is_left(serve: Any) -> None:
    server = serve(lambda _: (302, {"Location": "/again"}, b""))
    assert "leads on more than 5 times" in refusal(server.host)
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("status", "kind", "told"),
    [
        (403, ContainerError, "refuses {image} (403): it refuses to be asked without a login"),
        (404, ContainerError, "has no {image}: look for the tag 1.2 there"),
        (429, RegistryUnreachableError, "answers 429 to {image}: try again later (no words)"),
        (500, RegistryUnreachableError, "answers 500 to {image}: try again later (no words)"),
    ],
)
def test_a_refusal_an_image_that_is_not_there_and_a_sick_registry_are_told_apart(
    status: int, kind: type[ContainerError], told: str, serve: Any
) -> None:
    server = serve(lambda _: (status, {}, b"down\x1b[2Jtoday"))
    image = f"{server.host}/lab/train:1.2"
    with pytest.raises(ContainerError) as caught:
        resolve(parse_reference(image))
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"the registry {server.host} {told.format(image=image)}")


def test_a_digest_that_is_not_there_is_named(serve: Any) -> None:
    server = serve(lambda _: (404, {}, b""))
    assert refusal(server.host, f"train@{OTHER}").endswith(f"look for the digest {OTHER} there")


@pytest.mark.parametrize("head", [200, 405])
def test_where_a_registry_names_no_digest_it_is_that_of_the_manifest(head: int, serve: Any) -> None:
    server = serve(lambda asked: (head if asked.method == "HEAD" else 200, {}, MANIFEST))
    assert resolve(parse_reference(f"{server.host}/train")) == DIGEST
    assert [each.method for each in server.asked] == ["HEAD", "GET"]


def test_a_manifest_without_end_is_left(serve: Any) -> None:
    server = serve(lambda _: (200, {}, b" " * (5 << 20)))
    assert "more than 4 MiB: no manifest" in refusal(server.host)


@pytest.mark.parametrize("said", ["sha256:../../../home/ada/.ssh", "sha512:ab", DIGEST.upper()])
def test_a_word_for_a_digest_that_is_none_is_not_taken(said: str, serve: Any) -> None:
    server = serve(lambda _: (200, {"Docker-Content-Digest": said}, MANIFEST))
    assert f"with {said!r}, which is no digest: tell whoever runs it" in refusal(server.host)


def test_another_digest_than_the_one_asked_for_is_not_taken(serve: Any) -> None:
    server = serve(manifest)
    assert f"with {DIGEST!r}, which is another digest" in refusal(server.host, f"train@{OTHER}")


def test_only_the_loopback_is_spoken_to_in_plain(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = serve(manifest)
    monkeypatch.setenv("http_proxy", f"http://{spy.host}")
    monkeypatch.setenv("https_proxy", f"http://{spy.host}")
    monkeypatch.setenv("no_proxy", "")
    for host in ("registry.example.org", "127.evil.example.org", "127.0.0.1.example.org:5000", "localhost.evil.org"):
        log_in(host)
        assert "does not answer from this machine" in refusal(host)
    assert spy.asked == []  # a tunnel is asked for by CONNECT, which it does not know


@pytest.mark.parametrize(
    ("host", "own"),
    [("localhost", True), ("localhost:5000", True), ("127.0.0.1", True), ("127.8.8.8:1", True), ("[::1]", True),
     ("[::1]:5000", True), ("127.evil.org", False), ("127.0.0.1.evil.org", False), ("localhost.evil.org:1", False),
     ("10.0.0.1:5000", False), ("[fe80::1]", False), ("", False)],
)  # fmt: skip
def test_the_loopback_is_known_by_its_address_and_not_by_how_a_name_begins(host: str, own: bool) -> None:
    assert is_loopback(host) is own


def test_a_registry_that_is_not_there_is_told_with_what_to_do() -> None:
    told = refusal("127.0.0.1:9")
    assert told.startswith(
        "the registry 127.0.0.1:9 does not answer from this machine, so what 127.0.0.1:9/lab/train:1.2 stands for is "
        "not known: name the image by its digest, 127.0.0.1:9/lab/train@sha256:…, or try again ("
    )
    assert "Connection refused" in told


def test_a_login_shows_its_password_in_no_text() -> None:
    assert PASSWORD not in repr(Credentials("lab", "ada", PASSWORD))
