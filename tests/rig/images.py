"""What the rig's containers are made of: made once a machine, since no public registry need be reachable."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deployments.environment import SetupError
from tests.rig.packages import path_with_sbin

# Outlives sessions and, on most machines, a boot; open to every user, and not among the rigs' own folders.
CACHE = Path("/var/tmp/nexa-rig-cache")
_PYTHON = ("python3", "ca-certificates")  # python3-minimal lacks json
_PYTHON_WITHOUT = (  # squashing what a trial has no use for takes seconds
    "usr/bin/*perl*", "usr/lib/*/gconv", "usr/lib/*/libapt-*", "usr/lib/*/perl-base", "usr/lib/apt",
    "usr/lib/python3.*/pydoc_data", "usr/lib/python3.*/test", "usr/share/doc", "usr/share/info", "usr/share/locale",
    "usr/share/man", "usr/share/zoneinfo", "var/cache/*", "var/lib/apt/*", "var/lib/dpkg/*", "var/log/*",
)  # fmt: skip
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Image:
    """A base image: its name once it is loaded, and what `docker load` and `docker-archive://` read."""

    name: str
    archive: Path

    @property
    def recipe(self) -> str:
        """What tells this making of the image from others."""
        about = self.archive.stat()
        return f"{self.archive.name} {about.st_size} {about.st_mtime_ns}"


def busybox() -> Image:
    """A shell and its tools, 2 MB."""
    program = shutil.which("busybox") or "busybox"
    digest = hashlib.sha256(Path(program).read_bytes()).hexdigest()
    name = "nexa-rig/busybox:1"
    return Image(name, kept("busybox.tar", digest, lambda target: _archive(name, _busybox_root, target)))


def python() -> Image:
    """This machine's Debian with its Python."""
    suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "bookworm")
    recipe = f"{suite} {_PYTHON} {_PYTHON_WITHOUT}"
    name = "nexa-rig/python:1"

    def root(target: Path) -> None:
        debootstrap(suite, _PYTHON, target)
        for pattern in _PYTHON_WITHOUT:
            for path in target.glob(pattern):
                _remove(path)

    return Image(name, kept("python.tar", recipe, lambda target: _archive(name, root, target)))


def kept(name: str, recipe: str, make: Callable[[Path], None]) -> Path:
    """Return a file or a folder of the cache, made if it is missing, damaged, or of another recipe.

    Raises:
        SetupError: the cache is somebody else's, or it cannot be made.
    """
    CACHE.mkdir(exist_ok=True, mode=0o755)
    if CACHE.is_symlink() or CACHE.stat().st_uid != os.geteuid():
        raise SetupError(f"{CACHE} is another user's")
    CACHE.chmod(0o755)
    path, stamp = CACHE / name, CACHE / f"{name}.json"
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_whole(path, stamp, recipe):
            return path
        print(f"making {path} (once a machine)", file=sys.stderr, flush=True)
        stamp.unlink(missing_ok=True)
        draft = CACHE / f"{name}.new"
        for old in (draft, path):
            _remove(old)
        make(draft)
        draft.replace(path)
        entry = {"recipe": recipe, "size": _size(path)}
        draft.write_text(json.dumps(entry))
        draft.replace(stamp)
    return path


def _is_whole(path: Path, stamp: Path, recipe: str) -> bool:
    try:
        return bool(json.loads(stamp.read_text()) == {"recipe": recipe, "size": _size(path)})
    except (OSError, ValueError):
        return False


def _size(path: Path) -> int:
    """Return what shows that something is whole: a file's bytes, or how many entries a folder has in all."""
    if path.is_dir():
        return sum(len(folders) + len(files) for _, folders, files in os.walk(path))
    return path.stat().st_size


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def debootstrap(suite: str, packages: Sequence[str], root: Path) -> None:
    """Install a minimal Debian in a folder; what it mounts there ends with it.

    Raises:
        SetupError: it fails; the message holds its last words.
    """
    argv = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}", suite, str(root)]
    _must(["unshare", "--mount", "--propagation", "private", "--", *argv])
    shutil.rmtree(root / "var/cache/apt/archives", ignore_errors=True)


def _busybox_root(root: Path) -> None:
    for folder in ("bin", "dev", "etc", "proc", "root", "sys", "tmp", "var/tmp"):
        (root / folder).mkdir(parents=True)
    for folder in ("tmp", "var/tmp"):
        (root / folder).chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    program = root / "bin/busybox"
    shutil.copy(shutil.which("busybox") or "busybox", program)
    for applet in _must([str(program), "--list"]).split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    _must(["chroot", str(root), "/bin/sh", "-c", "true"])  # it is static


def _archive(name: str, make_root: Callable[[Path], None], target: Path) -> None:
    """Write what `docker save` writes of an image of one layer, without a docker."""
    work = target.with_name(f"{target.name}.work")
    _remove(work)
    root, image = work / "root", work / "image"
    image.mkdir(parents=True)
    root.mkdir()
    make_root(root)
    layer = image / "layer.tar"
    skipped = [f"--exclude=./{folder}/*" for folder in ("dev", "proc", "sys", "run")]
    _must(["tar", "--numeric-owner", *skipped, "-C", str(root), "-cf", str(layer), "."])
    with layer.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Env": [f"PATH={_PATH}"], "Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "nexa-rig"}],
    }
    (image / "config.json").write_text(json.dumps(config))
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    (image / "manifest.json").write_text(json.dumps(manifest))
    _must(["tar", "-C", str(image), "-cf", str(target), "manifest.json", "config.json", "layer.tar"])
    shutil.rmtree(work)


def _must(argv: Sequence[str]) -> str:
    environment = {**os.environ, "PATH": path_with_sbin(), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        argv, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        told = "\n".join(f"{done.stdout}{done.stderr}".splitlines()[-20:])
        raise SetupError(f"{' '.join(argv)} failed (exit code {done.returncode}):\n{told}")
    return done.stdout
