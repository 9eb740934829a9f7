"""A real registry of images of the rig's own, on the loopback, over plain HTTP, with a password or without."""

from __future__ import annotations

import base64
import json
import re
import secrets
from functools import cached_property
from pathlib import Path
from typing import Self

import bcrypt

from deployments.environment import SetupError
from tests.rig.daemons import Daemon, free_ports, listens, put
from tests.rig.docker import DockerRig
from tests.rig.slurm_parts import clean_environment

_DIGEST = re.compile(r"digest: (sha256:[0-9a-f]{64})")
_CONFIG = """\
version: 0.1
log: {{level: info}}
storage:
  filesystem: {{rootdirectory: {folder}/data}}
  delete: {{enabled: true}}
http: {{addr: "{address}"}}
"""
_AUTH = "auth: {{htpasswd: {{realm: rig, path: {folder}/htpasswd}}}}\n"


class RegistryRig:
    """Starts, finds and stops a registry in `folder`, which may have been started by another process.

    Args:
        folder: where everything lives; its path must be plain.
        auth: whether `user` and `password` are asked for.
    """

    def __init__(self, folder: Path, *, auth: bool = True) -> None:
        self.folder = folder.resolve()
        self.auth = auth
        self.user = "rig"
        self._config = self.folder / "config.yml"

    @cached_property
    def password(self) -> str:
        """The user's password: chosen once, the same after a restart."""
        record = self.folder / "password"
        if not record.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            put(record, secrets.token_hex(8), mode=0o600)
        return record.read_text()

    @cached_property
    def port(self) -> int:
        """The port on the loopback: chosen once, the same after a restart."""
        record = self.folder / "port.json"
        if not record.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            put(record, json.dumps(free_ports(1)))
        return int(json.loads(record.read_text())[0])

    @property
    def address(self) -> str:
        """What an image's name begins with; docker speaks plain HTTP to the loopback, apptainer if it is told to."""
        return f"127.0.0.1:{self.port}"

    @cached_property
    def daemon(self) -> Daemon:
        """The registry itself."""
        argv = ["docker-registry", "serve", str(self._config)]
        return Daemon("registry", self.folder / "daemons", argv, clean_environment())

    # -- up and down

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the registry, unless it runs, and wait until it answers.

        Raises:
            SetupError: it does not start; the message ends with its last words.
        """
        (self.folder / "client").mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        if self.auth:
            if not (hashes := self.folder / "htpasswd").exists():
                hashed = bcrypt.hashpw(self.password.encode(), bcrypt.gensalt(rounds=4)).decode()
                put(hashes, f"{self.user}:{hashed}\n", mode=0o600)
            token = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
            known = {"auths": {self.address: {"auth": token}}}
            put(self.folder / "client" / "config.json", json.dumps(known), mode=0o600)
        text = _CONFIG + (_AUTH if self.auth else "")
        put(self._config, text.format(folder=self.folder, address=self.address))
        self.daemon.start()
        self.daemon.await_ready(lambda: listens(self.port))

    def stop(self) -> None:
        """End the registry; what was pushed stays."""
        self.daemon.stop()

    # -- use

    @property
    def login(self) -> dict[str, str]:
        """What makes docker's commands know the password, as variables of the environment."""
        return {"DOCKER_CONFIG": str(self.folder / "client")}

    def push(self, docker: DockerRig, image: str, name: str) -> str:
        """Push an image of the daemon's as `name`, such as `train:1`, and return its digest, `sha256:…`.

        Another image under the same name moves the tag: the digest of the first one stays good.

        Raises:
            SetupError: it is refused; the message holds docker's words.
        """
        target = f"{self.address}/{name}"
        docker.must("tag", image, target)
        told = docker.must("push", target, more=self.login)
        docker.must("rmi", target)
        if not (found := _DIGEST.search(told)):
            raise SetupError(f"docker push told no digest:\n{told}")
        return found.group(1)
