"""The cluster file that one copies: it can be read, and so can each line of it that is commented out."""

from __future__ import annotations

import re
from pathlib import Path

from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.load import load_cluster

EXAMPLE = Path(__file__).resolve().parents[2] / "deployments" / "clusters" / "example.yaml"


def test_the_example_of_a_cluster_file_is_read_as_it_stands() -> None:
    assert load_cluster(EXAMPLE).model_dump(exclude_unset=True) == {
        "name": "example",
        "host": "login.example.org",
        "user": "ada",
        "workdir": "/scratch/ada/nexa",
    }


def test_the_example_of_a_cluster_file_shows_every_key(tmp_path: Path) -> None:
    whole = tmp_path / "whole.yaml"
    whole.write_text(re.sub(r"^# (?=[a-z_]+: )", "", EXAMPLE.read_text(), flags=re.MULTILINE))

    assert load_cluster(whole).model_fields_set == set(Cluster.model_fields)
