"""What a registry says of an image: the digest that a tag stands for now, asked by its HTTP interface.

Source: OCI Distribution Specification 1.1, "Pulling manifests"; the token flow as Docker's registries document it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from nexa_infra.containers.credentials import Credentials, remembered
from nexa_infra.containers.images import DIGEST, HUB, Reference
from nexa_infra.errors import ContainerError

if TYPE_CHECKING:
    import requests

_MANIFESTS = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "oci.image.index.v1",
        "oci.image.manifest.v1",
        "docker.distribution.manifest.list.v2",
        "docker.distribution.manifest.v2",
    )
)
_SECONDS = 20.0
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
# The specification lets registries refuse manifests above 4 MiB; what is longer is none.
_MOST_BYTES = 4 << 20
_MOST_REDIRECTS = 5


class RegistryUnreachableError(ContainerError):
    """A registry could not be asked: whether it has the image is not known."""


@dataclass(frozen=True)
class _Answer:
    """What a registry has said; `address` is who said it, after all redirects."""

    address: str
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def fine(self) -> bool:
        return self.status < 400

    @property
    def words(self) -> str:
        said = self.body[:300].decode(errors="replace")
        return "".join(each if each.isprintable() else " " for each in said).strip() or "no words"


def resolve(reference: Reference) -> str:
    """Return the digest of an image's manifest, `sha256:…`; a digest that is given is looked up.

    The registry's login is the one that this process was given, else what `docker login` has kept on this machine.

    Raises:
        RegistryUnreachableError: the registry does not answer, or not as a registry does.
        ContainerError: it refuses, or has no such image; the message says which.
    """
    import requests

    login = _login_of(reference.registry)
    wanted = reference.digest or reference.tag or "latest"
    host = "registry-1.docker.io" if reference.registry == HUB else reference.registry
    found: _Answer | None = None
    whys = []
    # Only the loopback may speak plain HTTP, as Docker has it.
    for scheme in ("https", "http") if is_loopback(host) else ("https",):
        try:
            found = _ask(f"{scheme}://{host}/v2/{reference.repository}/manifests/{wanted}", login)
            break
        except requests.RequestException as error:
            whys.append(_cause(str(error)))
    if found is None:
        why = "; ".join(dict.fromkeys(whys))
        raise RegistryUnreachableError(
            f"the registry {reference.registry} does not answer from this machine, so what {reference} stands for is "
            f"not known: name the image by its digest, {reference.name}@sha256:…, or try again ({why})"
        )
    if found.status in {401, 403}:
        who = f"the login of {login.username}" if login else "to be asked without a login"
        raise ContainerError(
            f"the registry {reference.registry} refuses {reference} ({found.status}): it refuses {who}, or has no "
            f"image of this name; give a registry block that may read it, or run `docker login {reference.registry}`"
        )
    if found.status == 404:
        what = f"the digest {reference.digest}" if reference.digest else f"the tag {wanted}"
        raise ContainerError(f"the registry {reference.registry} has no {reference}: look for {what} there")
    if not found.fine:
        raise RegistryUnreachableError(
            f"the registry {reference.registry} answers {found.status} to {reference}: try again later ({found.words})"
        )
    digest = found.headers.get("Docker-Content-Digest") or reference.digest or _digest_of(found.body)
    # It names a file, and what is run: a registry's word for it is not taken unread.
    if not DIGEST.fullmatch(digest) or reference.digest not in {None, digest}:
        raise ContainerError(
            f"the registry {reference.registry} answers {reference} with {digest[:100]!r}, which is "
            f"{'another digest' if DIGEST.fullmatch(digest) else 'no digest'}: tell whoever runs it"
        )
    return digest


def is_loopback(host: str) -> bool:
    """Say whether a registry, HOST or HOST:PORT, is on this machine by its very name."""
    name = re.sub(r":[0-9]+$", "", host).strip("[]")
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def _cause(words: str) -> str:
    """Return the end of what urllib3 says, which alone is for people."""
    return re.sub(r"[\"']\)+$", "", words.rpartition("): ")[2])[-300:] or words[-300:]


def _login_of(registry: str) -> Credentials | None:
    if (given := remembered(registry)) is not None:
        return given
    from docker.auth import load_config
    from docker.errors import DockerException

    try:
        found = load_config().resolve_authconfig(registry)
    except (DockerException, ValueError):
        return None
    if not found or not (found.get("username") or found.get("Username")):
        return None
    return Credentials(
        registry, found.get("username") or found.get("Username"), found.get("password") or found.get("Secret") or ""
    )


def _ask(address: str, login: Credentials | None) -> _Answer:
    """Ask for a manifest, as the registry wants to be asked: openly, by name and password, or by a token."""
    headers = {"Accept": _MANIFESTS, "Accept-Encoding": "identity"}
    basic = _basic(login) if login else {}
    found = _send("HEAD", address, headers)
    # Where a registry sends us elsewhere, nobody there is told who we are.
    if found.status == 401 and _origin(found.address) == _origin(address):
        scheme, _, rest = found.headers.get("WWW-Authenticate", "").partition(" ")
        if scheme.lower() == "bearer":
            given = dict(_CHALLENGE.findall(rest))
            token = _token(given.pop("realm", ""), given, address, basic)
            if isinstance(token, _Answer):
                return token
            headers["Authorization"] = f"Bearer {token}"
            found = _send("HEAD", address, headers)
        elif scheme.lower() == "basic" and basic:
            headers |= basic
            found = _send("HEAD", address, headers)
    if found.status == 405 or (found.fine and "Docker-Content-Digest" not in found.headers):
        found = _send("GET", address, headers)
    return found


def _token(realm: str, asked: Mapping[str, str], address: str, basic: Mapping[str, str]) -> str | _Answer:
    """Return the token that a registry wants to see, or the refusal of who gives it.

    A name and a password go there by https only; in plain on the loopback, where a registry of the loopback says so.
    """
    import requests

    place = urlsplit(realm)
    plain = place.scheme == "http" and is_loopback(place.netloc) and is_loopback(urlsplit(address).netloc)
    if not (place.scheme == "https" or plain) or "@" in place.netloc:
        raise requests.exceptions.InvalidURL(
            f"it wants a login to be sent to {realm[:100]!r}, where others can read it"
        )
    url = requests.Request("GET", realm, params=dict(asked)).prepare().url or realm
    found = _send("GET", url, basic)
    if found.status in {401, 403}:
        return found
    try:
        said = json.loads(found.body) if found.fine else {}
        token = said.get("token") or said.get("access_token")
    except (ValueError, AttributeError):
        token = None
    if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
        told = f"{found.status}, {found.words}" if not found.fine else "no token"
        raise requests.exceptions.InvalidHeader(f"{place.netloc}, which gives its tokens, answers with {told}")
    return token


def _basic(login: Credentials) -> dict[str, str]:
    from base64 import b64encode

    return {"Authorization": f"Basic {b64encode(f'{login.username}:{login.password}'.encode()).decode()}"}


def _send(method: str, address: str, headers: Mapping[str, str]) -> _Answer:
    """Send a request where it leads; its login goes to the address that was asked, and to no other.

    Raises:
        requests.RequestException: there is no answer, or none that may be followed.
    """
    import requests

    began = address
    for _ in range(_MOST_REDIRECTS + 1):
        same = _origin(address) == _origin(began)
        told = {name: value for name, value in headers.items() if same or name != "Authorization"}
        with requests.Session() as session:
            # What is said in plain goes through no proxy; and no ~/.netrc replaces a token.
            session.trust_env = address.startswith("https://")
            session.auth = _as_it_is
            found = session.request(method, address, headers=told, timeout=_SECONDS, allow_redirects=False, stream=True)
            if not found.is_redirect:
                body = bytearray()
                for piece in found.iter_content(1 << 16):
                    body += piece
                    if len(body) > _MOST_BYTES:
                        raise requests.exceptions.ContentDecodingError("it answers with more than 4 MiB: no manifest")
                return _Answer(address, found.status_code, found.headers, bytes(body))
        onward = urljoin(address, found.headers["Location"])
        before, after = urlsplit(address), urlsplit(onward)
        plain = after.scheme == "http" and before.scheme == "http" and is_loopback(after.netloc)
        if not (after.scheme == "https" or plain):
            raise requests.exceptions.InvalidURL(f"it leads to {onward[:100]!r}, where others can change what is said")
        address = onward
    raise requests.exceptions.TooManyRedirects(f"it leads on more than {_MOST_REDIRECTS} times")


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _origin(address: str) -> tuple[str, str]:
    place = urlsplit(address)
    return place.scheme, place.netloc.lower()


def _digest_of(body: bytes) -> str:
    import hashlib

    return f"sha256:{hashlib.sha256(body).hexdigest()}"
