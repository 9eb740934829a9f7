"""What a registry says of an image: the digest that a tag stands for now, asked by its HTTP interface.

Source: OCI Distribution Specification 1.1, "Pulling manifests"; the token flow as Docker's registries document it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from nexa_infra.containers.credentials import Credentials, remembered
from nexa_infra.containers.images import HUB, Reference
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


class RegistryUnreachableError(ContainerError):
    """A registry could not be asked: whether it has the image is not known."""


def resolve(reference: Reference) -> str:
    """Return the digest of an image's manifest, `sha256:…`; a digest that is given is looked up.

    The registry's login is the one that this process was given, else what `docker login` has kept on this machine.

    Raises:
        RegistryUnreachableError: the registry does not answer.
        ContainerError: it refuses, or has no such image; the message says which.
    """
    import requests

    login = _login_of(reference.registry)
    wanted = reference.digest or reference.tag or "latest"
    host = "registry-1.docker.io" if reference.registry == HUB else reference.registry
    found: requests.Response | None = None
    why = ""
    for scheme in _schemes(host):
        address = f"{scheme}://{host}/v2/{reference.repository}/manifests/{wanted}"
        try:
            with requests.Session() as session:
                session.trust_env = True
                found = _ask(session, address, login)
            break
        except requests.RequestException as error:
            why = str(error)
    if found is None:
        raise RegistryUnreachableError(
            f"the registry {reference.registry} does not answer from this machine, so what {reference} stands for is "
            f"not known: name the image by its digest, {reference.name}@sha256:…, or try again ({why[-300:]})"
        )
    if found.status_code in {401, 403}:
        who = f"the login of {login.username}" if login else "to be asked without a login"
        raise ContainerError(
            f"the registry {reference.registry} refuses {reference} ({found.status_code}): it refuses {who}; give a "
            f"registry block that may read it, or run `docker login {reference.registry}`"
        )
    if found.status_code == 404:
        what = f"the digest {reference.digest}" if reference.digest else f"the tag {wanted}"
        raise ContainerError(f"the registry {reference.registry} has no {reference}: look for {what} there")
    if not found.ok:
        raise RegistryUnreachableError(
            f"the registry {reference.registry} answers {found.status_code} to {reference}: {found.text[:300].strip()}"
        )
    return str(found.headers.get("Docker-Content-Digest") or reference.digest or _digest_of(found))


def _schemes(host: str) -> tuple[str, ...]:
    """Only the loopback may speak plain HTTP, as Docker has it."""
    name = host.rpartition(":")[0] or host
    return ("http", "https") if name in {"localhost", "[::1]"} or name.startswith("127.") else ("https",)


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


def _ask(session: requests.Session, address: str, login: Credentials | None) -> requests.Response:
    """Ask for a manifest, as the registry wants to be asked: openly, by name and password, or by a token."""
    headers = {"Accept": _MANIFESTS}
    found = session.head(address, headers=headers, timeout=_SECONDS, allow_redirects=True)
    if found.status_code == 401:
        scheme, _, rest = found.headers.get("WWW-Authenticate", "").partition(" ")
        basic = (login.username, login.password) if login else None
        if scheme.lower() == "bearer":
            given = dict(_CHALLENGE.findall(rest))
            realm = given.pop("realm", "")
            # A name and a password go to nobody but the registry that was named, and only where they cannot be read.
            if not realm.startswith("https://") and not address.startswith("http://"):
                return found
            token = session.get(realm, params=given, auth=basic, timeout=_SECONDS)
            if not token.ok:
                return token
            said = token.json()
            headers["Authorization"] = f"Bearer {said.get('token') or said.get('access_token')}"
            found = session.head(address, headers=headers, timeout=_SECONDS, allow_redirects=True)
        elif scheme.lower() == "basic" and basic is not None:
            found = session.head(address, headers=headers, auth=basic, timeout=_SECONDS, allow_redirects=True)
    if found.ok and "Docker-Content-Digest" not in found.headers:
        found = session.get(address, headers=headers, timeout=_SECONDS)
    return found


def _digest_of(found: requests.Response) -> str:
    import hashlib

    return f"sha256:{hashlib.sha256(found.content).hexdigest()}"
