"""What a training on a cluster made: the same manifest through SSH as here, verified there, brought and verified."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from nexa_infra import launch_training_job
from nexa_infra.errors import ArtifactError
from nexa_infra.hosts import connections, line, ssh
from nexa_infra.hosts.base import ConnectionLostError
from nexa_infra.operations import fetch as bringing
from nexa_infra.operations import manage
from nexa_infra.operations.fetch import fetch
from nexa_infra.runs.artifact import read_artifact
from nexa_infra.runs.manifest import contents_here, contents_of
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.run import TrainingConfig
from tests.rig.clusters import cluster_at
from tests.rig.proxy import Proxy, reached, wait
from tests.rig.ssh import SshRig

SCRIPT = """
cd "$NEXA_TRIAL_DIR" && mkdir "a dir" && echo '{"loss": 0.5}' >metrics.json && printf model >model.bin
printf x >$'line\\nend \\\\ \\xff'; ln -s model.bin latest; ln -s / "a dir/away"; mkfifo pipe
head -c "$1" /dev/urandom >big
"""


def a_training(size: int = 1000) -> TrainingConfig:
    job = {"name": "one", "time": "00:05:00", "memory": "50M"}
    return TrainingConfig.model_validate(
        {"job": job, "launcher": {"type": "command", "command": ["bash", "-c", SCRIPT, "trial", str(size)]}}
    )


@pytest.fixture(autouse=True)
def project(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a little code in it, to be in."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "code.txt").write_text("code\n")
    monkeypatch.chdir(folder)


def test_a_folder_has_one_manifest_here_and_through_ssh(sshd: SshRig, tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s a "new\nplace" $(x) `y` *'
    (folder / "sub" / "empty").mkdir(parents=True)
    for number, name in enumerate(
        [b"a\nb", b"a\\b", b"a\\nb", b"\xff\xfe", b" a ", b"-n", b"a\rb", "é😀".encode(), b"*"]
    ):
        (folder / "sub" / os.fsdecode(name)).write_bytes(os.urandom(number * 100))
    (folder / "away").symlink_to("/etc")
    (folder / "sub" / "broken\n").symlink_to("no\n where \udcff")
    os.mkfifo(folder / "pipe")
    with reached(sshd) as host:
        there = contents_of(host, folder)
    assert there == contents_here(folder) and len(there) == 11
    (folder / "only" / "folders").mkdir(parents=True)
    with reached(sshd) as host:
        assert contents_of(host, folder / "only") == {}


def test_a_training_on_a_cluster_is_verified_there_and_brought(cluster: Cluster, sshd: SshRig, tmp_path: Path) -> None:
    made = launch_training_job(a_training(), cluster=cluster, fetch_to=tmp_path / "out")
    run = manage.find("latest")
    assert sshd.logins() == 1

    there, copy = Path(run.directory), tmp_path / "out" / run.id
    assert contents_here(there / "trials" / "0") == contents_here(copy / "trials" / "0")
    assert (there / "artifact.json").read_bytes() == (copy / "artifact.json").read_bytes()
    host = connections.host_of(cluster)
    assert read_artifact(run, host) == read_artifact(run, host, copy=copy) == made

    # Damage that rsync alone would not see is mended in the copy; damage there is told.
    model = copy / "trials" / "0" / "model.bin"
    seen = model.stat()
    model.write_text("modem")
    os.utime(model, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    fetch(run, to=tmp_path / "out")
    assert model.read_text() == "model"
    os.truncate(there / "trials" / "0" / "model.bin", 2)
    told = f"in {host.name}:.*/trials/0, model.bin has changed: it is 2 bytes.*was 5 bytes"
    with pytest.raises(ArtifactError, match=f"(?s){told}"):
        read_artifact(run, host)
    with pytest.raises(ArtifactError, match=f"(?s){told}"):
        fetch(run, to=tmp_path / "out")


def test_a_copy_that_was_cut_off_goes_on_where_it_stopped(
    sshd: SshRig, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "BACKOFF", (0.1, 0.2, 0.4))
    monkeypatch.setattr(line, "PULSE", 0.6)
    known = tmp_path / "known_hosts"
    with Proxy(sshd.port) as proxy:
        known.write_text(sshd.known_hosts.read_text().replace(f"]:{sshd.port}", f"]:{proxy.port}"))
        cluster = cluster_at(sshd, workdir, port=proxy.port, known_hosts=str(known))
        launch_training_job(a_training(20_000_000), cluster=cluster)
        run = manage.find("latest")
        trial = run.files.trial(0)

        monkeypatch.setattr(bringing, "retried", lambda ask: ask())
        proxy.delay = 0.005

        def cut() -> None:
            # rsync's own draft of the file has grown.
            wait(lambda: any(path.stat().st_size > 500_000 for path in trial.glob(".big.*")))
            proxy.cut()

        cutting = threading.Thread(target=cut)
        cutting.start()
        with pytest.raises(ConnectionLostError):
            fetch(run)
        cutting.join()
        assert not (trial / "big").exists()  # no half of it under its name
        assert (trial / bringing._PARTIAL / "big").stat().st_size > 0
        proxy.delay = 0.0

        fetch(run)
        assert (trial / "big").read_bytes() == (Path(run.directory) / "trials" / "0" / "big").read_bytes()
        assert not [path for path in trial.rglob("*") if path.name == bringing._PARTIAL]
        connections.close_all()
