"""The price book: spellings, prices, and what is wrong with a book."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexa_infra.errors import PriceError
from nexa_infra.monitoring.prices import COLUMNS, PriceBook, load_price_book, parse_price_book, price_for, spelling
from nexa_infra.settings import settings
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.job import SlurmJob

HEADER = ",".join(COLUMNS)
TODAY = date(2026, 11, 24)


@pytest.fixture
def book() -> PriceBook:
    return load_price_book()


@pytest.mark.parametrize(
    ("written", "item"),
    [
        ("H100", "h100"),
        ("h100_80gb", "h100"),
        ("nvidia_h100_80gb_hbm3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("h100-sxm5", "h100"),
        ("a100-80", "a100-80gb"),
        ("A100-SXM4-80GB", "a100-80gb"),
        ("A100 80 GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("nvidia_a100_80gb_pcie", "a100-80gb"),
        ("nvidia_a100-sxm4-40gb", "a100-40gb"),
        ("A100-40GB", "a100-40gb"),
        ("tesla-v100", "v100"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("tesla_t4", "t4"),
        ("nvidia-tesla-t4", "t4"),
        ("rtx5090", "rtx_5090"),
        ("RTX 5090", "rtx_5090"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("nvidia_geforce_rtx_4090", "rtx_4090"),
        ("4090", "rtx_4090"),
        ("mi300x", "mi300x"),
        ("AMD Instinct MI300X OAM", "mi300x"),
        ("nvidia_l40s", "l40s"),
        ("NVIDIA-L4", "l4"),
        ("NVIDIA H200", "h200"),
        ("nvidia_b200", "b200"),
    ],
)
def test_spellings_that_people_use_resolve(book: PriceBook, written: str, item: str) -> None:
    assert book.find(written).item == item


@pytest.mark.parametrize(
    "written",
    [
        *("rtx_a1000", "h20", "l400", "l40", "a10", "a1000", "gb200", "gh200", "v100s", "t4g", "b2000", "mi300a"),
        *("rtx_4090_d", "rtx_4090_laptop", "rtx_5090_ti", "rtx_6000_ada", "h100_nvl", "v100-32gb", "h100-96gb"),
        # Slices of a card are not the card.
        *("a100_1g.5gb", "nvidia_a100_80gb_pcie_1g.10gb", "a100-7g-40gb", "a100_3g", "h100.mig", "a100_80gb_80gb"),
        *("cpu", "gpu", "", "nvidia", "80gb", "hbm3", "a100_gb", "100"),
    ],
)
def test_no_other_card_passes_for_a_known_one(book: PriceBook, written: str) -> None:
    with pytest.raises(PriceError, match="no price is known for the GPU type"):
        book.find(written)


def test_every_spelling_in_the_book_resolves_to_its_own_row(book: PriceBook) -> None:
    for name, item in (*book.aliases.items(), *((item, item) for item in book.types)):
        for variant in (name, name.upper(), name.replace("-", "_"), name.replace("_", " "), f"nvidia_{name}"):
            assert book.find(variant).item == item


@given(st.text(max_size=20))
def test_any_text_is_either_a_known_card_or_a_price_error(text: str) -> None:
    book = parse_price_book(f"{HEADER}\nh100,h100-80gb,6.88,gpu-hour,aws,list,2026-11-23\n")
    if spelling(text) in {"h100", "h100 80gb"}:
        assert book.find(text).item == "h100"
    else:
        with pytest.raises(PriceError, match="h100"):
            book.find(text)


def test_a_bare_a100_is_the_dearer_of_the_two(book: PriceBook) -> None:
    dearer = max(book.find("a100-40gb"), book.find("a100-80gb"), key=lambda price: price.usd_per_hour)
    assert book.find("a100") == dearer


def test_the_first_row_of_a_type_is_its_default_and_a_provider_may_be_named(book: PriceBook) -> None:
    assert (book.find("h100").provider, book.find("h100").usd_per_hour) == ("aws", Decimal("6.88"))
    assert book.find("H100", "Nebius").usd_per_hour == Decimal("2.95")
    with pytest.raises(PriceError, match=r"no price of h100 from 'gcp', only from aws, nebius"):
        book.find("h100", "gcp")


def test_a_core_hour_has_a_price(book: PriceBook) -> None:
    price = book.find(None)
    assert (price.item, price.unit, price.usd_per_hour) == ("cpu", "core-hour", Decimal("0.0529"))
    assert book.find(None, "nebius").usd_per_hour == Decimal("0.0248")


def test_every_row_of_the_bundled_book_says_where_its_price_is_from(book: PriceBook) -> None:
    assert len(book.rows) == 21
    for row in book.rows:
        assert row.usd_per_hour > 0
        assert row.source
        assert row.date == "2026-11-23"


def test_an_unknown_type_names_the_nearest_and_the_remedy(book: PriceBook) -> None:
    with pytest.raises(PriceError) as caught:
        book.find("h10")
    assert str(caught.value).startswith("no price is known for the GPU type 'h10': did you mean h100")
    assert "rtx_5090" in str(caught.value)
    assert "job.cost_per_gpu_hour" in str(caught.value)


def test_a_users_book_stands_in_place_of_the_bundled_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "my prices.csv"
    path.write_text(f"{HEADER}\nRTX_A6000,a6000|ampere6000,0.80,gpu-hour,us,invoice,2026-01-01\n", encoding="utf-8-sig")
    monkeypatch.setenv("NEXA_PRICE_BOOK", str(path))
    settings.cache_clear()
    book = load_price_book()
    assert book.find("nvidia rtx a6000").usd_per_hour == Decimal("0.80")
    assert book.find("Ampere6000").item == "RTX_A6000"
    with pytest.raises(PriceError, match="the book has RTX_A6000"):
        book.find("h100")
    with pytest.raises(PriceError, match=r"my prices\.csv has no price of a core-hour: set job\.cost_per_core_hour"):
        book.find(None)


def test_a_preferred_provider_is_taken_where_it_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXA_PRICE_PROVIDER", "Nebius")
    settings.cache_clear()
    book = load_price_book()
    assert book.find("h100").provider == "nebius"
    assert book.find("t4").provider == "aws"
    monkeypatch.setenv("NEXA_PRICE_PROVIDER", "nebiuss")
    settings.cache_clear()
    with pytest.raises(PriceError, match=r"NEXA_PRICE_PROVIDER is 'nebiuss'.*did you mean 'nebius'"):
        load_price_book()


ROW = "h100,,6.88,gpu-hour,aws,list,2026-11-23"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no row"),
        (HEADER, "it has no row"),
        ("gpu_type,usd_per_hour\nh100,6.88\n", ":1: the header lacks aliases, unit, provider, source, date"),
        (HEADER.replace("aliases", "alias"), ":1: unknown column 'alias' (did you mean 'aliases'?)"),
        (f"{HEADER},date", ":1: the header names a column twice"),
        (f"{HEADER}\n{ROW}\n\nh200,,1\n", ":4: 3 cells, where the header has 7"),
        (f"{HEADER}\n{ROW},x\n", ":2: 8 cells, where the header has 7"),
        (f"{HEADER}\n{ROW.replace('6.88', '$6.88')}", ":2: usd_per_hour: '$6.88' is no number"),
        (f"{HEADER}\n{ROW.replace('6.88', '0')}", ":2: usd_per_hour: '0' is no price above 0"),
        (f"{HEADER}\n{ROW.replace('6.88', '-1')}", ":2: usd_per_hour: '-1' is no price above 0"),
        (f"{HEADER}\n{ROW.replace('6.88', 'NaN')}", ":2: usd_per_hour: 'NaN' is no price above 0"),
        (f"{HEADER}\n{ROW.replace('6.88', 'sNaN')}", ":2: usd_per_hour: 'sNaN' is no price above 0"),
        (f"{HEADER}\n{ROW.replace('6.88', '1e999999')}", ":2: usd_per_hour: '1e999999' is no price above 0"),
        (f"{HEADER}\n{ROW.replace('6.88', '')}", ":2: usd_per_hour: it is empty"),
        (f"{HEADER}\n{ROW.replace('gpu-hour', 'hour')}", ":2: unit: 'hour' is neither gpu-hour nor core-hour"),
        (f"{HEADER}\n{ROW.replace('gpu-hour', 'core-hour')}", ":2: unit: 'cpu' is priced by core-hour"),
        (f"{HEADER}\n{ROW.replace('h100', 'cpu')}", ":2: unit: 'cpu' is priced by core-hour"),
        (f"{HEADER}\n{ROW.replace('h100', 'nvidia')}", ":2: gpu_type: 'nvidia' names no card"),
        (f"{HEADER}\n{ROW.replace('2026-11-23', '23.11.2026')}", ":2: date: '23.11.2026' is no day"),
        (f"{HEADER}\n{ROW.replace('2026-11-23', '20261123')}", ":2: date: '20261123' is no day"),
        (f"{HEADER}\n{ROW}\n{ROW.replace('aws', 'AWS')}", ":3: gpu_type: h100 from AWS already stands on line 2"),
        (f"{HEADER}\n{ROW}\n{ROW.replace('h100', 'H-100')}", ":3: aliases: 'H-100' already means h100"),
        (f"{HEADER}\n{ROW}\n{ROW.replace('h100,', 'h200,h100')}", ":3: aliases: 'h100' already means h100"),
        (f'{HEADER}\n"h100,,6.88\n', ": this is no CSV"),
    ],
)
def test_a_book_that_makes_no_sense_is_one_error_with_its_line(text: str, message: str) -> None:
    with pytest.raises(PriceError) as caught:
        parse_price_book(text, "prices.csv").find("h100")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_book_that_cannot_be_read_is_a_price_error(tmp_path: Path) -> None:
    with pytest.raises(PriceError, match=r"nowhere\.csv cannot be read: No such file"):
        load_price_book(tmp_path / "nowhere.csv")
    with pytest.raises(PriceError, match="cannot be read: Is a directory"):
        load_price_book(tmp_path)
    (tmp_path / "latin.csv").write_bytes(HEADER.encode() + b"\nh100\xff")
    with pytest.raises(PriceError, match=r"latin\.csv is not UTF-8"):
        load_price_book(tmp_path / "latin.csv")


def test_a_jobs_own_price_comes_before_its_clusters_and_the_books(book: PriceBook) -> None:
    job = SlurmJob(gpus_per_node=4, gpu_type="H100", cost_per_gpu_hour=Decimal("3.25"))
    cluster = Cluster(name="c", workdir="/scratch", cost_per_gpu_hour=Decimal("1.5"))
    own = price_for(job, cluster, book, today=TODAY)
    assert (own.item, own.usd_per_hour, own.provider) == ("H100", Decimal("3.25"), "job")
    assert (own.source, own.date, own.unit) == ("job.cost_per_gpu_hour", "2026-11-24", "gpu-hour")
    unpriced = job.model_copy(update={"cost_per_gpu_hour": None})
    theirs = price_for(unpriced, cluster, book, today=TODAY)
    assert (theirs.usd_per_hour, theirs.provider, theirs.source) == (
        Decimal("1.5"),
        "cluster",
        "cluster.cost_per_gpu_hour",
    )
    assert price_for(unpriced, None, book) == book.find("h100")


def test_a_job_without_gpus_is_priced_by_core_hour_in_the_same_order(book: PriceBook) -> None:
    cluster = Cluster(name="c", workdir="/scratch", cost_per_gpu_hour=Decimal(9), cost_per_core_hour=Decimal("0.02"))
    own = price_for(SlurmJob(cost_per_core_hour=Decimal("0.01")), cluster, book, today=TODAY)
    assert (own.item, own.unit, own.usd_per_hour) == ("cpu", "core-hour", Decimal("0.01"))
    assert price_for(SlurmJob(), cluster, book).source == "cluster.cost_per_core_hour"
    assert price_for(SlurmJob(), None, book) == book.find(None)


def test_an_explicit_price_needs_no_known_type(book: PriceBook) -> None:
    usd = Decimal("0.4")
    assert price_for(SlurmJob(gpus_per_node=1, cost_per_gpu_hour=usd), None, book).item == "gpu"
    odd = SlurmJob(gpus_per_node=1, gpu_type="rtx_a1000", cost_per_gpu_hour=Decimal(0))
    assert price_for(odd, None, book).item == "rtx_a1000"
    assert price_for(odd, None, book).usd_per_hour == 0
    assert price_for(SlurmJob(gres="gpu:a100:2", cost_per_gpu_hour=usd), None, book).item == "a100"


def test_gpus_without_a_type_or_a_price_are_an_error_that_says_what_to_set(book: PriceBook) -> None:
    with pytest.raises(PriceError, match=r"set job\.gpu_type, or job\.cost_per_gpu_hour"):
        price_for(SlurmJob(gpus_per_node=2), None, book)
    with pytest.raises(PriceError, match=r"set job\.gpu_type, or job\.cost_per_gpu_hour"):
        price_for(SlurmJob(gres="gpu:2"), None, book)


def test_a_type_that_gres_names_is_priced(book: PriceBook) -> None:
    assert price_for(SlurmJob(gres="gpu:nvidia_a100_80gb_pcie:2"), None, book).item == "a100-80gb"
