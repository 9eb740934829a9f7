"""The program that a config names: where it is, from the top of the code or beside the config."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from nexa_infra.spec.fields import nearest, shown

# Where a script of the same name is looked for, to say so: never a whole disk.
_MOST_FOLDERS = 500


def find_script(script: str, root: Path, folder: Path) -> str:
    """Return a script as it is found in the code: relative to `root`, or absolute as it was given.

    A relative script is looked for from `root`, the top of the code, then from `folder`, the
    config's own.

    Raises:
        ValueError: there is none, or it lies outside the code; the message says where it was
            looked for and what is near.
    """
    if script.startswith("~"):
        raise ValueError(f"{shown(script)} is not expanded: write the whole path, or one from the top of the code")
    if Path(script).is_absolute():
        if not _is(Path.is_file, Path(script)):
            raise ValueError(_complaint(script, [Path(script)]))
        return script
    places = [Path(os.path.normpath(base / script)) for base in dict.fromkeys((root, folder))]
    for place in places:
        if _is(Path.is_file, place):
            if not place.is_relative_to(root):
                raise ValueError(
                    f"{shown(script)} leads out of the code ({place}): only what is under {root} travels with the run"
                )
            return place.relative_to(root).as_posix()
    if not any(place.is_relative_to(root) for place in places):
        raise ValueError(f"{shown(script)} leads out of the code: write a path below {root}, without ..")
    raise ValueError(_complaint(script, places, root))


def _is(kind: Callable[[Path], bool], place: Path) -> bool:
    """Ask for a path's kind; one that cannot be looked up (too long, no permission) has none."""
    try:
        return kind(place)
    except OSError:
        return False


def _complaint(script: str, places: list[Path], root: Path | None = None) -> str:
    if folder := next((place for place in places if _is(Path.is_dir, place)), None):
        told = f"{shown(script)} is a folder ({folder}), not a script"
        inside = sorted(path.name for path in _files(folder) if path.suffix == ".py")
        return f"{told}: name the file in it" + (f", such as {script.rstrip('/')}/{inside[0]}" if inside else "")
    told = f"there is no script {shown(script)}: looked in {' and in '.join(str(place.parent) for place in places)}"
    for place in places:
        if found := nearest(place.name, (path.name for path in _files(place.parent))):
            return f"{told} (did you mean '{(Path(script).parent / found).as_posix()}'?)"
    if root is not None and (same := next(_same_name(root, Path(script).name), None)):
        return f"{told} (did you mean '{same.relative_to(root).as_posix()}'?)"
    return told


def _files(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            yield from sorted(Path(entry.path) for entry in entries if entry.is_file())
    except OSError:
        return


def _same_name(root: Path, name: str) -> Iterator[Path]:
    """Yield the files of this name under `root`, as far as a short look finds them."""
    for number, (here, folders, files) in enumerate(os.walk(root)):
        if number >= _MOST_FOLDERS:
            return
        folders[:] = sorted(folder for folder in folders if not folder.startswith((".", "node_modules", "__pycache__")))
        if name in files:
            yield Path(here) / name
