"""The image catalog: read, complained of with its lines, and asked for its targets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nexa_infra.containers.catalog import Catalog, catalog_of, load_catalog, parse_catalog, target_of
from nexa_infra.containers.credentials import Credentials
from nexa_infra.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "deployments" / "images"
DIGEST = "sha256:" + "0123456789abcdef" * 4


def told(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_catalog(text, "c.yaml")
    return str(caught.value).splitlines()


def test_a_catalog_file_is_read_into_targets(tmp_path: Path) -> None:
    file = tmp_path / "catalog.yaml"
    file.write_text(f"""\
require_digest: true
targets:
  train:
    image: registry.example.org:5000/team/train:1.2
    digest: {DIGEST}
    purpose: what we train with
    command: [python3, train.py]
    health: [nexa-health]
    network: host
    shm_size: 8G
    memory: 512
    cpus: 0.5
    processes: 99
    env: {{A: "1", B: 010}}
    mounts: [{{source: /etc/site, target: /etc/site}}]
    volumes: [datasets]
""")

    catalog = load_catalog(file)

    train = target_of(catalog, "train")
    assert (train.image, train.digest, train.pinned) == ("registry.example.org:5000/team/train:1.2", DIGEST, True)
    assert (train.command, train.health) == (("python3", "train.py"), ("nexa-health",))
    assert (train.shm_size, train.memory, train.cpus, train.processes) == ("8G", "512M", 0.5, 99)
    assert train.env == {"A": "1", "B": "010"}
    assert [(mount.source, mount.read_only) for mount in train.mounts] == [("/etc/site", True)]
    assert (train.volumes, train.network) == (("datasets",), "host")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "c.yaml:1: is empty: a catalog has the key targets:"),
        ("- a", "c.yaml:1: is a list, not a mapping"),
        ("targets: {}", "c.yaml:1: targets: names no target: write targets: {NAME: {image: REGISTRY/NAME:TAG}}"),
        ("require_digest: true", "targets: names no target"),
        ("targets:\n  a: {image: x}\ntarget: 1", "c.yaml:3: target: there is no such key (did you mean 'targets'?)"),
        ("image: x\ntargets: {a: {image: x}}", "c.yaml:1: image: there is no such key here: it belongs to a target"),
        ("targets: {a: {image: x, targets: 1}}", "there is no such key here: it belongs to the top level"),
        ("targets:\n  a:\n    imgae: x", "c.yaml:3: targets.a.imgae: there is no such key (did you mean 'image'?)"),
        ("targets: {a: {purpose: x}}", "targets.a.image: is missing: say which image it is"),
        ("targets: {a: {image: x, mem: 3}}", "targets.a.mem: there is no such key (did you mean 'memory'?)"),
        ("targets: {a: {image: x, gpus: 3}}", "a job says how many GPUs it gets (job.gpus_per_node)"),
        ("targets: {a: {image: x, zzz: 3}}", "there is no such key: a target has env, mounts"),
        ("targets: {a: }", "targets.a: is no target: write a: {image: REGISTRY/NAME:TAG}"),
        ("targets: {a: x}", "targets.a: is no target: write a: {image: REGISTRY/NAME:TAG}"),
        ("targets: {a b: {image: x}}", "'a b' is no target's name: use letters, digits"),
        ("targets: {a: {image: x, digest: sha256:ab}}", "'sha256:ab' is no digest: write sha256: and 64 hexadecimal"),
        ("targets: {a: {image: 'x@sha256:ab'}}", "targets.a.image: 'sha256:ab' is no digest"),
        (
            f"targets: {{a: {{image: 'x@{DIGEST}', digest: '{DIGEST[:-1]}0'}}}}",
            "targets.a.digest: is another than the image's own: keep one of the two",
        ),
        ("targets: {a: {image: x, command: python3 train.py}}", "a list is meant here, not one value: write [python3,"),
        ("targets: {a: {image: x, shm_size: big}}", "'big' is no size: write a number with K, M, G or T"),
        ("targets: {a: {image: x, network: hots}}", "'hots' is not one of none or host (did you mean 'host'?)"),
        ("targets: {a: {image: x, env: {HOME: /x}}}", "targets.a.env.HOME: is the container's scratch folder"),
        (
            "targets:\n  a:\n    image: x\n    mounts:\n    - {source: /d, traget: /x}",
            "c.yaml:5: targets.a.mounts[0].traget: there is no such key (did you mean 'target'?)",
        ),
        ("targets: {a: {image: x}}\nrequire_digest: yes", "c.yaml:2: require_digest: true or false is meant here"),
    ],
)
def test_a_catalog_says_what_is_wrong_where_and_what_to_do(text: str, expected: str) -> None:
    [line] = told(text)

    assert expected in line


def test_every_complaint_is_made_at_once_in_the_order_of_the_file() -> None:
    lines = told("targets:\n  a: {image: x, digest: no}\n  b:\n    imag: y\nrequire: true\n")

    assert [line.split(" ")[0] for line in lines] == ["c.yaml:2:", "c.yaml:4:", "c.yaml:5:"]


def test_a_file_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "catalog.yaml").write_text("")

    with pytest.raises(ConfigError, match=r"there is no such file \(did you mean 'catalog.yaml'\?\)"):
        load_catalog(tmp_path / "catalogue.yaml")


def test_an_unknown_target_names_the_nearest_and_lists_what_there_is() -> None:
    catalog = load_catalog(IMAGES / "catalog.yaml")

    with pytest.raises(ConfigError) as caught:
        target_of(catalog, "trian-light", file="catalog.yaml")
    assert str(caught.value) == (
        "catalog.yaml: targets: there is no target 'trian-light' (did you mean 'train-light'?); "
        "there are infer, train-heavy, train-light"
    )
    with pytest.raises(ConfigError, match="there is no target 'x'; there are none"):
        target_of(Catalog(targets={}), "x")


def test_a_target_without_a_digest_is_refused_where_the_catalog_demands_one(tmp_path: Path) -> None:
    file = tmp_path / "catalog.yaml"
    file.write_text(f"require_digest: true\ntargets:\n  a: {{image: x:1}}\n  b: {{image: 'x@{DIGEST}'}}\n")
    catalog = load_catalog(file)

    assert target_of(catalog, "b", file=file).pinned
    with pytest.raises(ConfigError) as caught:
        target_of(catalog, "a", file=file)
    assert str(caught.value).startswith(f"{file}:3: targets.a: has no digest, and the catalog demands one")
    assert "push x:1, and write the sha256:… that `docker push` prints under digest" in str(caught.value)


def test_plain_data_is_checked_with_the_same_words() -> None:
    with pytest.raises(ConfigError, match="^ours: targets.a.imgae: there is no such key"):
        catalog_of({"targets": {"a": {"imgae": "x"}}}, "ours")


def test_the_project_s_own_catalog_says_how_each_target_is_run() -> None:
    catalog = load_catalog(IMAGES / "catalog.yaml")

    assert sorted(catalog.targets) == ["infer", "train-heavy", "train-light"]
    for name, target in catalog.targets.items():
        assert target.image == f"nexa-infra/{name}:0.1.0"
        assert target.purpose and target.command and target.health == ("nexa-health",)
        assert target.shm_size and target.processes and target.network


@pytest.mark.parametrize("name", ["train-light", "train-heavy", "infer", "flow"])
def test_a_dockerfile_takes_its_base_and_ends_as_an_unprivileged_user(name: str) -> None:
    text = (IMAGES / name / "Dockerfile").read_text()

    assert re.search(r"^ARG BASE_IMAGE", text, re.MULTILINE)
    assert re.findall(r"^USER (.*)", text, re.MULTILINE) == ["nexa"]
    assert "--uid 1000" in text
    assert "nexa-health" in text
    # BuildKit's own words would fail under the builder that Debian's Docker has.
    assert "RUN --mount" not in text and "COPY --chmod" not in text


@pytest.mark.parametrize("file", sorted(IMAGES.glob("*/*.txt")), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_what_an_image_installs_is_pinned_as_the_tests_have_it(file: Path) -> None:
    known = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text().lower(), re.MULTILINE))
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]

    for line in lines:
        name, equals, version = line.partition("==")
        assert equals, f"{line} is not pinned"
        assert known.get(name.lower(), version) == version


def test_credentials_do_not_show_their_password() -> None:
    assert "hush" not in repr(Credentials("registry.example.org", "ada", "hush"))
