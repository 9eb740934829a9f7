"""A config file as checked models; each complaint with file, line, key and the nearest spelling."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nexa_infra.errors import ConfigError, Problem
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.complaints import HIDDEN, findings_of, unknown_key
from nexa_infra.spec.compose import Finding, Place, PlacedDict, PlacedList, Tree, compose, problem
from nexa_infra.spec.fields import KeyPath, kind_of, nearest, one_line, suggestion
from nexa_infra.spec.foreign import SHELL_SCRIPT, foreign
from nexa_infra.spec.launcher import placeholders
from nexa_infra.spec.overrides import override
from nexa_infra.spec.run import SweepConfig, TrainingConfig
from nexa_infra.spec.script import find_script

# Far above any config that a person keeps: 16 MiB are some 300,000 listed trials.
MOST_BYTES = 16 * 2**20
# What a person reads before they mend the file and try again.
MOST_COMPLAINTS = 40


def load_config(path: str | Path) -> SweepConfig | TrainingConfig:
    """Read and check a config file.

    Raises:
        ConfigError: the file cannot be read, or not understood; every complaint names file, line
            and key, in the order of the file.
    """
    return read_config(path)


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig | TrainingConfig:
    """Read and check a config file with overrides, each `dotted.key=YAML value`, in place of its values.

    The launcher's script must exist, from the top of the code (`code_root`) or beside the config;
    the config returned has it relative to the top of the code.

    Raises:
        ConfigError: the file cannot be read, or not understood; every complaint names file, line
            and key, in the order of the file. A complaint about an override names its text.
    """
    source = str(path)
    tree = override(composed(path), overrides, source)
    if not isinstance(tree.data, PlacedDict):
        what = "is empty" if tree.data is None else f"is {kind_of(tree.data)}, not a mapping"
        told = f"{what}: a config has the keys launcher: and sweep: (or training:), and mostly job:"
        raise config_error([Finding((), told)], tree, source)
    if theirs := foreign(tree.data):
        raise config_error([theirs], tree, source)
    root = TrainingConfig if "training" in tree.data and "sweep" not in tree.data else SweepConfig
    data, findings = _as_the_model_has_it(tree.data, root, Path(path))
    try:
        config = root.model_validate(data)
    except ValidationError as error:
        findings.extend(_told_once(list(findings_of(error, root)), root))
    # A fault of the form explains what is wrong above and below it; an override without a key does not.
    below = [one.path for one in tree.findings if one.path or not isinstance(one.place, str)]
    findings = [one for one in findings if not any(_on_one_branch(one.path, path) for path in below)]
    if findings or tree.findings:
        raise config_error([*tree.findings, *findings], tree, source)
    return config


def load_cluster(path: str | Path) -> Cluster:
    """Read and check a cluster file, which holds the keys of `Cluster`; its name is the file's, unless it says another.

    Raises:
        ConfigError: the file cannot be read, or not understood; every complaint names file, line and key.
    """
    source = str(path)
    tree = composed(path)
    if not isinstance(tree.data, PlacedDict):
        what = "is empty" if tree.data is None else f"is {kind_of(tree.data)}, not a mapping"
        raise config_error([Finding((), f"{what}: a cluster has at least the key workdir:")], tree, source)
    findings: list[Finding] = []
    cluster = None
    try:
        cluster = Cluster.model_validate({"name": Path(path).stem, **tree.data})
    except ValidationError as error:
        findings.extend(findings_of(error, Cluster))
    if cluster is None or tree.findings:
        raise config_error([*tree.findings, *findings], tree, source)
    return cluster


def code_root(config_path: Path) -> Path:
    """Return the top of the code that a config belongs to, absolute.

    It is the nearest folder above the config that holds `.git`, or else the config's own folder.
    """
    folder = config_path.parent.resolve()
    return next((place for place in (folder, *folder.parents) if (place / ".git").exists()), folder)


def locate(path: str | Path, key: str) -> int | None:
    """Return the line of a key (`sweep.trials[3].lr`), or of the nearest key above it that the file has.

    `None` where the file can no longer be read.
    """
    return problem_at(path, key, "").line


def problem_at(path: str | Path | None, key: str, message: str, overrides: Sequence[str] = ()) -> Problem:
    """Make a complaint about a config's key that was found after the config was read.

    With the overrides that the config was read with, a complaint about one of them names its text.
    """
    if path is None:
        return Problem(key, message)
    try:
        tree = override(composed(path), overrides, str(path))
    except ConfigError:
        return Problem(key, message, str(path))
    place = tree.place(_path_of(tree.data, key))
    if isinstance(place, str):
        return Problem(key, message, f"override {place}")
    return Problem(key, message, str(path), place)


def composed(path: str | Path) -> Tree:
    """Read a YAML file as a tree that knows where each of its parts stands.

    Raises:
        ConfigError: the file cannot be read, or is not YAML.
    """
    source = str(path)
    text = _read(Path(path), source)
    if text.startswith("#!"):
        raise ConfigError(Problem("", SHELL_SCRIPT, source, 1))
    return compose(text, source)


def _read(path: Path, source: str) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(Problem("", _no_such_file(path), source)) from None
    except IsADirectoryError:
        inside = ", ".join(_yaml_files(path)[:5])
        told = f": name a file in it, such as {inside}" if inside else ", and holds none"
        raise ConfigError(Problem("", f"is a folder, not a config file{told}", source)) from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(Problem("", f"cannot be read: {why}", source)) from error
    if len(raw) > MOST_BYTES:
        most = f"{MOST_BYTES // 2**20} MiB"
        told = f"is larger than {most}, the most that a config may be: write axes under sweep.parameters, not points"
        raise ConfigError(Problem("", told, source))
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(Problem("", "is UTF-16, not UTF-8: save it as UTF-8", source, 1))
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        told = f"is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start:,}; save it as UTF-8"
        raise ConfigError(Problem("", told, source, line)) from None


def _no_such_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no such file: there is no folder {folder}"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    if hint := suggestion(path.name, names):
        return f"there is no such file{hint}"
    inside = ", ".join(_yaml_files(folder)[:5])
    return f"there is no such file{f'; the folder has {inside}' if inside else ', and no config beside it'}"


def _yaml_files(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.suffix in {".yaml", ".yml"})
    except OSError:
        return []


def _as_the_model_has_it(
    data: PlacedDict, root: type[SweepConfig | TrainingConfig], file: Path
) -> tuple[dict[str, Any], list[Finding]]:
    """Return the data that the model reads, and what is wrong that no model can see."""
    findings = [Finding((key,), unknown_key((key,), root)) for key in data if key in HIDDEN]
    kept = {key: value for key, value in data.items() if key not in HIDDEN}
    if "sweep" in kept and "training" in kept:
        findings.append(Finding(("training",), "stands beside sweep: a config has one of the two; remove the other"))
        del kept["training"]
    if "health" in kept and root is SweepConfig:
        told = "goes with training: a sweep's trials are judged by their ends, and retry says what follows; remove it"
        findings.append(Finding(("health",), told))
        del kept["health"]
    launcher = kept.get("launcher")
    if isinstance(launcher, PlacedDict):
        kept["launcher"], wrong = _with_script(launcher, file)
        findings.extend(wrong)
    return kept, findings


def _with_script(launcher: PlacedDict, file: Path) -> tuple[dict[str, Any], list[Finding]]:
    """Return the launcher with its script as it is found in the code."""
    kind, script = launcher.get("type", "python"), launcher.get("script")
    findings: list[Finding] = []
    if "python" in launcher and kind in {"torchrun", "command"}:
        instead = "set job.setup to choose an environment" if kind == "torchrun" else "name the program in command"
        findings.append(Finding(("launcher", "python"), f"goes with type: python, but type is {kind}: {instead}"))
    if not isinstance(script, str) or not script or kind == "command" or placeholders([script]):
        return launcher, findings
    try:
        found = find_script(one_line(script), code_root(file), file.parent.resolve())
    except ValueError as error:
        return launcher, [*findings, Finding(("launcher", "script"), str(error))]
    return {**launcher, "script": found}, findings


def _told_once(findings: list[Finding], root: type[SweepConfig | TrainingConfig]) -> Iterator[Finding]:
    """Yield findings without the missing keys that stand there under a misspelled name."""
    unknown = [one.path for one in findings if one.kind == "extra_forbidden"]
    for one in findings:
        names = [str(path[-1]) for path in unknown if path[:-1] == one.path[:-1]]
        if one.kind == "missing" and any(nearest(name, root.model_fields) == one.path[-1] for name in names):
            continue
        yield one


def config_error(findings: Iterable[Finding], tree: Tree, source: str) -> ConfigError:
    """Make one error of every finding, in the order of the file, overrides last."""

    def order(pair: tuple[Place, Finding]) -> tuple[bool, int]:
        place = pair[0]
        return (True, 0) if isinstance(place, str) else (False, place)

    placed = [(tree.place(one.path) if one.place is None else one.place, one) for one in dict.fromkeys(findings)]
    placed.sort(key=order)
    problems = [problem(source, place, one.path, one.message) for place, one in placed[:MOST_COMPLAINTS]]
    if len(placed) > MOST_COMPLAINTS:
        problems.append(Problem("", f"and {len(placed) - MOST_COMPLAINTS:,} more complaints; mend these first", source))
    return ConfigError(*problems)


def _on_one_branch(one: KeyPath, other: KeyPath) -> bool:
    return all(step == beside for step, beside in zip(one, other, strict=False))


def _path_of(data: Any, key: str) -> KeyPath:
    """Return the path that a dotted key means in this data, as far as the data goes."""
    if isinstance(data, PlacedDict):
        for name in sorted(data, key=len, reverse=True):
            rest = key.removeprefix(name)
            if key.startswith(name) and (not rest or rest[0] in ".["):
                return (name, *_path_of(data[name], rest.removeprefix(".")))
    if isinstance(data, PlacedList) and (found := re.match(r"\[([0-9]{1,9})\]\.?", key)):
        number = int(found[1])
        if number < len(data):
            return (number, *_path_of(data[number], key[found.end() :]))
    return ()
