"""Print what a pyproject.toml asks for: to build it, to run it, and to run its examples."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

asked = tomllib.loads(Path(sys.argv[1]).read_text())
project = asked["project"]
print(
    "\n".join(
        [*asked["build-system"]["requires"], *project["dependencies"], *project["optional-dependencies"]["examples"]]
    )
)
