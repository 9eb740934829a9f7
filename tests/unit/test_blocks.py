"""Blocks: their fields, their messages, and that a real server gives back what was saved."""

from __future__ import annotations

import subprocess
import sys
from decimal import Decimal
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from nexa_infra.blocks import PriceList, SlurmCluster
from nexa_infra.errors import PriceError
from nexa_infra.monitoring.prices import load_price_book

if TYPE_CHECKING:
    from tests.conftest import PrefectServer

FULL: dict[str, Any] = {
    "workdir": "/scratch/ada/nexa/",
    "host": "login.example.org",
    "user": "ada",
    "port": 2222,
    "key_file": "~/.ssh/id_ed25519",
    "key_passphrase": "open sesame",
    "known_hosts": "~/.ssh/known_hosts",
    "jump_host": "ada@gate.example.org:22",
    "partition": "gpu",
    "account": "vision",
    "limits": {"max_array_size": 1001, "max_submit": 5000},
    "runtime": "apptainer",
    "cost_per_gpu_hour": 3.25,
    "cost_per_core_hour": 0.0529,
    "poll_floor": 10,
    "poll_ceiling": 60,
}
ROW: dict[str, Any] = {"gpu_type": "h100", "usd_per_hour": 2.95, "date": "2026-11-23"}


def complaint(block: type[SlurmCluster] | type[PriceList], fields: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        block(**fields)
    return str(caught.value)


def test_a_cluster_block_makes_the_plain_cluster_with_every_field() -> None:
    cluster = SlurmCluster(**FULL).to_cluster("hpc")

    assert cluster.model_dump() == {
        "name": "hpc",
        "host": "login.example.org",
        "user": "ada",
        "port": 2222,
        "key_file": "~/.ssh/id_ed25519",
        "known_hosts": "~/.ssh/known_hosts",
        "jump_host": "ada@gate.example.org:22",
        "keyboard_interactive": False,
        "workdir": "/scratch/ada/nexa",
        "partition": "gpu",
        "account": "vision",
        "limits": {"max_array_size": 1001, "max_submit": 5000},
        "runtime": "apptainer",
        "volumes": {},
        "allowed_mounts": (),
        "cost_per_gpu_hour": Decimal("3.25"),
        "cost_per_core_hour": Decimal("0.0529"),
        "cost_per_billing_hour": None,
        "poll_floor": 10.0,
        "poll_ceiling": 60.0,
    }


def test_a_cluster_block_with_a_workdir_alone_is_the_login_node_one_stands_on() -> None:
    cluster = SlurmCluster(workdir="/scratch/ada").to_cluster()

    assert cluster.host is None
    assert (cluster.user, cluster.key_file, cluster.jump_host, cluster.partition) == (None, None, None, None)
    assert (cluster.cost_per_gpu_hour, cluster.cost_per_core_hour) == (None, None)


def test_no_secret_reaches_the_plain_cluster_or_the_block_as_text() -> None:
    block = SlurmCluster(**FULL)

    assert "open sesame" not in block.to_cluster("hpc").model_dump_json()
    assert "open sesame" not in repr(block)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "workdir"),
        ({"workdir": "nexa"}, "'nexa' is no absolute path on the cluster: write /scratch/you/nexa"),
        ({"workdir": "~/nexa"}, "~ and $VARIABLES are not expanded"),
        ({"workdir": "/"}, "name a directory of your own"),
        ({"workdir": "/scratch/../etc"}, "goes up by '..'"),
        ({"user": "ada\nrm"}, "one line without control characters"),
        ({"workdir": "/s", "hots": "a"}, "there is no field 'hots' (did you mean 'host'?)"),
        ({"workdir": "/s", "host": "ada@login"}, "write it under user"),
        ({"workdir": "/s", "host": "-oProxyCommand=x"}, "is no address"),
        ({"workdir": "/s", "host": "login:2222"}, "the port under port"),
        ({"workdir": "/s", "host": "login", "user": "-l"}, "is no account's name"),
        ({"workdir": "/s", "host": "login", "port": 70000}, "less than or equal to 65535"),
        ({"workdir": "/s", "host": "login", "jump_host": "a b"}, "write user@host:port"),
        ({"workdir": "/s", "host": "login", "jump_host": "gate:99999"}, "not between 1 and 65535"),
        ({"workdir": "/s", "user": "ada"}, "user is for logging in, but there is no host"),
        ({"workdir": "/s", "host": "login", "key_passphrase": "hush"}, "key_file names none"),
        ({"workdir": "/s", "runtime": "podman"}, "'apptainer'"),
        ({"workdir": "/s", "cost_per_gpu_hour": -1}, "greater than or equal to 0"),
        ({"workdir": "/s", "cost_per_gpu_hour": float("nan")}, "finite"),
        ({"workdir": "/s", "poll_floor": 60, "poll_ceiling": 30}, "poll_floor (60 s) is over poll_ceiling (30 s)"),
    ],
)
def test_a_cluster_block_says_what_is_wrong_and_what_to_do(fields: dict[str, Any], expected: str) -> None:
    assert expected in complaint(SlurmCluster, fields)


def test_an_error_repeats_neither_a_passphrase_nor_a_pasted_key() -> None:
    pasted = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\n-----END OPENSSH PRIVATE KEY-----"

    assert "hush" not in complaint(SlurmCluster, {"workdir": "/s", "host": "login", "key_passphrase": "hush"})
    told = complaint(SlurmCluster, {"workdir": "/s", "host": "login", "key_file": pasted})
    assert "the path of its file is meant" in told
    assert "b3Blbn" not in told


def test_a_price_list_makes_the_price_book() -> None:
    cpu = {"gpu_type": "cpu", "usd_per_hour": 0.0248, "provider": "nebius", "source": "catalog", "date": "2026-11-23"}
    book = PriceList(rows=[{**ROW, "aliases": ["hopper"]}, cpu]).to_book()

    found = book.find("Hopper")
    assert (found.item, found.usd_per_hour, found.unit) == ("h100", Decimal("2.95"), "gpu-hour")
    assert (found.provider, found.source, found.date) == ("own", "price list", "2026-11-23")
    assert (book.find(None).usd_per_hour, book.find(None).unit) == (Decimal("0.0248"), "core-hour")


def test_a_price_list_read_from_the_bundled_csv_is_the_bundled_book() -> None:
    text = Path(load_price_book.__code__.co_filename).with_name("prices.csv").read_text()

    book = PriceList.from_csv(text).to_book()

    assert book.rows == load_price_book().rows
    assert dict(book.aliases) == dict(load_price_book().aliases)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "at least 1 item"),
        ([ROW, ROW], "h100 from own already stands on line 2"),
        ([{**ROW, "usd_per_hour": 0}], "greater than 0"),
        ([{**ROW, "usd_per_hour": 1e9}], "is no price above 0 and up to"),
        ([{**ROW, "date": "yesterday"}], "valid date"),
        ([{**ROW, "price": 3}], "price"),
        ([ROW, {**ROW, "gpu_type": "a100", "aliases": ["h100"]}], "already means h100"),
    ],
)
def test_a_price_list_says_what_is_wrong(rows: list[dict[str, Any]], expected: str) -> None:
    assert expected in complaint(PriceList, {"rows": rows})


def test_a_csv_that_is_no_price_book_is_refused_with_its_line() -> None:
    with pytest.raises(PriceError, match=r"the price list:1: unknown column 'gpu'"):
        PriceList.from_csv("gpu,price\nh100,3\n")


@pytest.mark.parametrize("block", [SlurmCluster, PriceList])
def test_a_block_shows_what_it_is(block: type[SlurmCluster] | type[PriceList]) -> None:
    schema = block.model_json_schema()

    assert block.get_description()
    assert str(block._logo_url).startswith("https://")
    assert str(block._documentation_url).startswith("https://")
    # A block whose fields all have defaults is refused where a deployment names it by reference.
    assert schema["required"]


def test_every_field_of_a_cluster_is_described_and_has_its_place_in_the_form() -> None:
    fields = SlurmCluster.model_json_schema()["properties"]

    assert [name for name, field in fields.items() if not field.get("description")] == []
    assert sorted(field["position"] for field in fields.values()) == list(range(len(fields)))


def test_the_blocks_are_an_entry_point_of_prefect_collections() -> None:
    [found] = [entry for entry in entry_points(group="prefect.collections") if entry.name == "nexa_infra"]

    assert found.load().SlurmCluster is SlurmCluster


@pytest.mark.server
def test_a_saved_cluster_is_loaded_as_it_was(prefect_server: PrefectServer) -> None:
    SlurmCluster(**FULL).save("hpc")

    loaded = SlurmCluster.load("hpc")

    assert isinstance(loaded, SlurmCluster)
    assert loaded.to_cluster() == SlurmCluster(**FULL).to_cluster("hpc")
    assert loaded.key_passphrase is not None
    assert loaded.key_passphrase.get_secret_value() == "open sesame"


@pytest.mark.server
def test_a_saved_price_list_is_loaded_as_it_was(prefect_server: PrefectServer) -> None:
    saved = PriceList(rows=[{**ROW, "aliases": ["hopper"]}])
    saved.save("ours")

    loaded = PriceList.load("ours")

    assert isinstance(loaded, PriceList)
    assert loaded.to_book() == saved.to_book()


@pytest.mark.server
def test_the_blocks_are_registered_from_the_command_line(prefect_server: PrefectServer) -> None:
    command = [sys.executable, "-m", "prefect", "block", "register", "-m", "nexa_infra.blocks"]
    done = subprocess.run(command, env=prefect_server.environment, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    assert "Slurm Cluster" in done.stdout
    assert "Price List" in done.stdout
    assert "Nexa Infra Base" not in done.stdout
