"""What builds and pushes the catalog's images: which commands it gives to Docker, and what it writes down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deployments.environment import SetupError
from deployments.images.__main__ import main
from deployments.images.build import CATALOG, Pushed, record
from deployments.local import ensure_docker_answers
from nexa_infra.containers.catalog import load_catalog
from nexa_infra.errors import ConfigError

DIGEST = "sha256:" + "a" * 64
# Notes what it is told; its answers are those of a real docker to the same questions.
DOCKER = f"""#!/bin/sh
for word in "$@"; do printf '%s\\n' "$word"; done >>"$LOG"
echo . >>"$LOG"
case "$1" in
    $FAILS) echo "denied: $1" >&2; exit 1 ;;
    image) echo '["elsewhere/infer@sha256:0", "registry.example.org/team/infer@{DIGEST}"]' ;;
esac
"""


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A docker that notes its arguments in the file returned, and fails in the verb that $FAILS names."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(DOCKER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAILS", "nothing")
    return tmp_path / "log"


def commands(log: Path) -> list[list[str]]:
    return [text.splitlines() for text in log.read_text().split(".\n")[:-1]]


def test_a_build_names_the_image_its_dockerfile_and_what_it_is_given(docker: Path) -> None:
    words = ["build", "--base", "debian:12", "--build-arg", "TORCH=", "--network", "host", "train-heavy"]

    assert main(words) == 0

    folder = CATALOG.parent
    assert commands(docker) == [
        [
            *("build", "--tag", "nexa-infra/train-heavy:0.1.0", "--file", str(folder / "train-heavy" / "Dockerfile")),
            *("--build-arg", "BASE_IMAGE=debian:12", "--build-arg", "TORCH=", "--network", "host", str(folder)),
        ]
    ]


def test_without_names_every_target_is_built(docker: Path) -> None:
    assert main(["build"]) == 0

    assert [each[2] for each in commands(docker)] == [
        f"nexa-infra/{name}:0.1.0" for name in ("train-light", "train-heavy", "infer")
    ]


def test_a_push_tags_pushes_and_writes_the_digest_into_a_new_catalog(
    docker: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ours" / "catalog.yaml"

    assert main(["push", "--registry", "registry.example.org/team", "--catalog", str(file), "infer"]) == 0

    image = "registry.example.org/team/infer:0.1.0"
    assert [each[:3] for each in commands(docker)] == [
        ["tag", "nexa-infra/infer:0.1.0", image],
        ["push", image],
        ["image", "inspect", "--format"],
    ]
    assert f"infer: {image}@{DIGEST}" in capfd.readouterr().out
    infer = load_catalog(file).targets["infer"]
    assert (infer.image, infer.digest, infer.command) == (image, DIGEST, ("nexa-serve",))
    assert load_catalog(file).targets["train-light"] == load_catalog(CATALOG).targets["train-light"]


def test_a_catalog_keeps_its_comments_and_what_else_it_says(tmp_path: Path) -> None:
    file = tmp_path / "catalog.yaml"
    file.write_text(
        "# ours\ntargets:\n  infer: # serves\n    image: old:1 # here\n    env: {A: '010'}\n  other: {image: x}\n"
    )

    record([Pushed("infer", "r.example.org/infer:2", DIGEST)], file)
    record([Pushed("infer", "r.example.org/infer:3", DIGEST)], file)

    text = file.read_text()
    assert "# ours\n" in text and "# serves" in text and "# here" in text and "{A: '010'}" in text
    catalog = load_catalog(file)
    assert (catalog.targets["infer"].image, catalog.targets["infer"].digest) == ("r.example.org/infer:3", DIGEST)
    assert catalog.targets["other"].image == "x"


def test_a_catalog_that_is_none_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "catalog.yaml"
    file.write_text("targets: {infer: {imgae: x}}\n")

    with pytest.raises(ConfigError, match="targets.infer.imgae"):
        record([Pushed("infer", "r.example.org/infer:2", DIGEST)], file)
    assert file.read_text() == "targets: {infer: {imgae: x}}\n"


@pytest.mark.parametrize(
    ("fails", "words", "expected"),
    [
        ("nothing", ["build", "trian-light"], "there is no target 'trian-light' (did you mean 'train-light'?)"),
        ("build", ["build", "infer"], "infer was not built (docker build, exit code 1)"),
        ("tag", ["push", "--registry", "r.example.org", "infer"], "is not built: python -m deployments.images build"),
        ("push", ["push", "--registry", "r.example.org", "infer"], "was not pushed: is `docker login` needed?"),
        ("nothing", ["push", "--registry", "http://r", "infer"], "'http://r' is no registry: write HOST/PREFIX"),
        ("nothing", ["push", "--registry", "r.example.org", "infer"], "Docker does not say by which digest"),
    ],
)
def test_what_goes_wrong_is_said(
    docker: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    fails: str, words: list[str], expected: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("FAILS", fails)

    assert main(words) == 2
    assert expected in capfd.readouterr().err


def test_a_machine_without_docker_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(SetupError, match="there is no docker on this machine: install it"):
        ensure_docker_answers()
    assert main(["build", "infer"]) == 2


def test_an_engine_that_does_not_answer_is_told_with_docker_s_words(
    docker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_docker_answers()
    monkeypatch.setenv("FAILS", "version")

    with pytest.raises(
        SetupError, match=r"(?s)Docker's engine does not answer.*`make up` does without.*denied: version"
    ):
        ensure_docker_answers()


def test_the_command_is_found_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "deployments.images", "--help"], capture_output=True, text=True)

    assert done.returncode == 0
    assert "build" in done.stdout and "push" in done.stdout
