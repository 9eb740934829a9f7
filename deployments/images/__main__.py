"""The catalog's images: build them here, push them to a registry.

python -m deployments.images build [--base IMAGE] [--build-arg NAME=VALUE] [--network MODE] [TARGET …]
python -m deployments.images push --registry HOST/PREFIX [--catalog FILE] [TARGET …]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deployments.environment import SetupError
from deployments.images.build import build, push, record
from nexa_infra.errors import ConfigError


def main(words: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deployments.images", description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    building = verbs.add_parser("build", help="build images with this machine's Docker")
    building.add_argument("--base", metavar="IMAGE", help="in place of each Dockerfile's own BASE_IMAGE")
    building.add_argument(
        "--build-arg",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="such as PIP_INDEX_URL=https://pypi.example.org/simple, or TORCH= for none in train-heavy",
    )
    building.add_argument("--network", metavar="MODE", help="how builds reach the network, such as host")
    pushing = verbs.add_parser("push", help="push what was built, and print the digests")
    pushing.add_argument("--registry", metavar="HOST/PREFIX", required=True, help="where to, such as example.org/team")
    pushing.add_argument("--catalog", metavar="FILE", type=Path, help="a catalog to write the digests to; made if new")
    for verb in (building, pushing):
        verb.add_argument("targets", metavar="TARGET", nargs="*", help="by default all that have a Dockerfile here")
    asked = parser.parse_args(words)
    try:
        if asked.verb == "build":
            build(asked.targets, base=asked.base, arguments=asked.build_arg, network=asked.network)
            return 0
        pushed = push(asked.registry, asked.targets)
        for each in pushed:
            print(f"{each.target}: {each.image}@{each.digest}")
        if asked.catalog:
            record(pushed, asked.catalog)
            print(f"written to {asked.catalog}")
    except (SetupError, ConfigError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
