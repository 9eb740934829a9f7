"""`apptainer`, of the Debian beside this file: replaces itself by it, where that Debian's /usr is seen under /usr.

A program of its own, which jobs find on their PATH; its first line is written by `ApptainerRig`. What it gets
reaches apptainer as it is: arguments, environment, folder, signals; the process id stays the same.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_BIND, _REC, _UNBINDABLE, _PRIVATE, _DETACH = 0x1000, 0x4000, 0x20000, 0x40000, 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
# Folders at the top that are that Debian's; every other one is the machine's, and so is what is named below.
_OURS = ("bin", "etc", "lib", "lib32", "lib64", "libx32", "sbin", "usr", "var")
_THEIRS = ("etc/hosts", "etc/resolv.conf", "etc/passwd", "etc/group", "var/tmp", "var/spool")
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Enter, and become apptainer."""
    rig = Path(__file__).resolve().parents[1]
    root = (rig / "root").resolve()
    here = Path.cwd()
    environment = Path("/proc/self/environ").read_bytes()
    _new_namespace()
    _call("mount", b"none", b"/", None, _REC | _PRIVATE, None)
    # One mount for all of /usr: apptainer's starter looks for its own path, and would not find it under another.
    place = root / "mnt"
    _call("mount", b"tmpfs", bytes(place), b"tmpfs", 0, b"mode=755,size=16m")
    upper, work, top = (place / name for name in ("upper", "work", "top"))
    for folder in (upper, work, top):
        folder.mkdir()
    layers = f"lowerdir={root},upperdir={upper},workdir={work}"
    _call("mount", b"overlay", bytes(top), b"overlay", 0, layers.encode())
    _call("mount", b"none", bytes(place), None, _UNBINDABLE, None)  # or /var/tmp, which it is in, would bring it again
    for path in Path("/").iterdir():
        if path.name not in _OURS and path.is_dir():
            (top / path.name).mkdir(exist_ok=True)
            _bind(path, top / path.name)
    for name in _THEIRS:
        if (top / name).exists() and Path("/", name).exists():
            _bind(Path("/", name), top / name)
    if (top / "dev/fuse").exists():
        _bind(rig / "fuse", top / "dev/fuse")
    os.chdir(top)
    number = _PIVOT_ROOT[os.uname().machine]
    _check("pivot_root", _libc.syscall(ctypes.c_long(number), b".", b"."))
    _call("umount2", b".", _DETACH)
    os.chdir("/")
    os.chdir(here)
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python
        signal.signal(ignored, signal.SIG_DFL)
    pairs = (entry.partition(b"=") for entry in environment.split(b"\0") if entry)
    program = "/usr/bin/apptainer"
    os.execve(program, [program, *sys.argv[1:]], {name: value for name, _, value in pairs})


def _new_namespace() -> None:
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _call("unshare", _NEWNS)
        return
    _call("unshare", _NEWNS | _NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _bind(path: Path, at: Path) -> None:
    _call("mount", bytes(path), bytes(at), None, _BIND | _REC, None)


def _call(name: str, *arguments: bytes | int | None) -> None:
    words = [ctypes.c_ulong(each) if isinstance(each, int) else each for each in arguments]
    _check(name, getattr(_libc, name)(*words))


def _check(name: str, result: int) -> None:
    if result:
        number = ctypes.get_errno()
        sys.exit(f"apptainer of the rig: {name}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
