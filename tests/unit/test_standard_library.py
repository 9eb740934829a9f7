"""What a steward runs by takes the standard library alone, of Python 3.9."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nexa_infra
from nexa_infra.scheduling.bundle import MODULES, write_bundle

PACKAGE = Path(nexa_infra.__file__).parent
IMPORT_ALL = f"""
import importlib, pkgutil, sys
for name in {MODULES!r}:
    importlib.import_module("nexa_infra." + name)
assert pkgutil.get_data("nexa_infra.scheduling.slurm", "submit.sh")
print(*sorted(name for name in sys.modules if name.startswith("nexa_infra.") and name[11:] in {MODULES!r}))
"""


def test_the_modules_of_a_steward_import_nothing_but_each_other_and_the_standard_library(tmp_path: Path) -> None:
    bundle = tmp_path / "steward.pyz"
    write_bundle(bundle, IMPORT_ALL)
    done = subprocess.run([sys.executable, "-I", "-S", bundle], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.split() == sorted(f"nexa_infra.{name}" for name in MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_a_steward_is_python_3_9(name: str) -> None:
    source = (PACKAGE / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 9))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    # What the grammar does not tell: arguments and names that came later.
    strict = [node.lineno for node in calls for word in node.keywords if (word.arg, _name(node)) == ("strict", "zip")]
    slots = [
        node.lineno
        for node in calls
        for word in node.keywords
        if word.arg in {"slots", "kw_only"} and _name(node) == "dataclass"
    ]
    assert not strict + slots
    assert not re.search(r"^from datetime import .*\bUTC\b", source, re.MULTILINE)
    assert "from __future__ import annotations\n" in source


def test_the_same_bundle_has_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write_bundle(tmp_path / name, "print()")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["one", "other"]


def _name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""
