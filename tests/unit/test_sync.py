"""Bringing the code over: what travels, what stays, and where it is put."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nexa_infra import sync_repository
from nexa_infra.errors import SyncError
from nexa_infra.hosts.local import LocalHost
from nexa_infra.hosts.login import Login
from nexa_infra.hosts.ssh import SshHost
from nexa_infra.operations import selection
from nexa_infra.operations import snapshots as snapshots_module
from nexa_infra.operations import sync as sync_module
from nexa_infra.operations.provenance import names_hash, tree_hash
from nexa_infra.operations.sync import _read
from nexa_infra.runs.record import Snapshot
from nexa_infra.settings import settings
from nexa_infra.spec.run import SyncRules


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.check_output(["git", "-C", str(folder), *identity, *words], text=True).strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository: a tracked script, an ignored file, an untracked one."""
    root = tmp_path / "my repository"
    (root / "pkg").mkdir(parents=True)
    (root / "train.py").write_text("print('hello')\n")
    (root / "train.py").chmod(0o755)
    (root / "pkg" / "model.py").write_text("layers = 3\n")
    (root / "link.py").symlink_to("pkg/model.py")
    (root / ".gitignore").write_text("*.log\ndata/\n")
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", "-A")
    git(root, "commit", "--quiet", "-m", "start")
    (root / "noise.log").write_text("ignored\n")
    (root / "data").mkdir()
    (root / "data" / "table.csv").write_text("1,2\n")
    (root / "new.py").write_text("untracked = True\n")
    return root


def files(snapshot: Snapshot) -> set[str]:
    root = Path(snapshot.path)
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_symlink() or path.is_file()}


def snapshots(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "snapshots").iterdir() if not path.name.startswith(".")}


def stagings(workdir: Path) -> list[Path]:
    return list((workdir / "snapshots").glob(".staging-*"))


def test_tracked_and_untracked_files_travel_and_ignored_ones_stay(repository: Path, tmp_path: Path) -> None:
    made = sync_repository(tmp_path / "there", root=repository)
    assert files(made) == {"train.py", "pkg/model.py", "link.py", ".gitignore", "new.py"}
    assert Path(made.path) == tmp_path / "there" / "snapshots" / made.hash
    assert made.files == 5
    assert os.access(Path(made.path) / "train.py", os.X_OK)
    assert (Path(made.path) / "link.py").readlink() == Path("pkg/model.py")


def test_rules_choose_what_travels(repository: Path, tmp_path: Path) -> None:
    rules = SyncRules(untracked=False, include=("data",), exclude=("*.gitignore", "pkg/"))
    assert files(sync_repository(tmp_path / "there", root=repository, rules=rules)) == {
        "train.py",
        "link.py",
        "data/table.csv",
    }


def test_the_same_code_is_copied_once_and_other_code_beside_it(repository: Path, tmp_path: Path) -> None:
    first = sync_repository(tmp_path / "there", root=repository)
    inode = (Path(first.path) / "train.py").stat().st_ino
    again = sync_repository(tmp_path / "there", root=repository)
    assert again.hash == first.hash
    assert (Path(again.path) / "train.py").stat().st_ino == inode
    (repository / "train.py").write_text("print('changed')\n")
    other = sync_repository(tmp_path / "there", root=repository)
    assert other.hash != first.hash
    assert (Path(first.path) / "train.py").read_text() == "print('hello')\n"
    assert snapshots(tmp_path / "there") == {first.hash, other.hash}


def test_a_snapshot_that_a_trial_has_changed_is_put_right(repository: Path, tmp_path: Path) -> None:
    first = sync_repository(tmp_path / "there", root=repository)
    (Path(first.path) / "train.py").write_text("print('spoilt')\n")
    sync_repository(tmp_path / "there", root=repository)
    assert (Path(first.path) / "train.py").read_text() == "print('hello')\n"


def test_the_commit_the_branch_and_changes_are_recorded(repository: Path, tmp_path: Path) -> None:
    (repository / "new.py").unlink()
    clean = sync_repository(tmp_path / "there", root=repository)
    assert clean.commit == git(repository, "rev-parse", "HEAD")
    assert (clean.branch, clean.dirty, clean.patch) == ("main", False, None)
    (repository / "train.py").write_text("print('dirty')\n")
    dirty = sync_repository(tmp_path / "there", root=repository)
    assert dirty.dirty and dirty.patch is not None


def test_a_file_that_git_tracks_and_that_is_gone_does_not_matter(repository: Path, tmp_path: Path) -> None:
    (repository / "train.py").unlink()
    assert "train.py" not in files(sync_repository(tmp_path / "there", root=repository))


def test_a_folder_without_git_travels_whole_but_for_what_is_never_code(tmp_path: Path) -> None:
    root = tmp_path / "plain"
    for name in ("train.py", "sub/lib.py", "__pycache__/x.pyc", ".nexa/runs/old/x", "venv/pyvenv.cfg", "venv/lib/a.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    assert files(sync_repository(tmp_path / "there", root=root)) == {"train.py", "sub/lib.py"}


def test_the_destination_and_earlier_runs_inside_the_code_do_not_travel(repository: Path) -> None:
    run = repository / "out" / "run-1"
    run.mkdir(parents=True)
    for name in ("run.json", "job.sbatch", "big.bin"):
        (run / name).write_text("x")
    made = sync_repository(repository / "here", root=repository)
    assert not any(name.startswith(("here/", "out/")) for name in files(made))
    assert "out/run-1/big.bin" in files(sync_repository(repository / "here", root=repository, include_runs=True))


def test_a_run_that_is_being_made_inside_the_code_does_not_travel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, made = tmp_path / "plain", tmp_path / "plain" / "mine" / "runs" / "new"
    made.mkdir(parents=True)
    (root / "train.py").write_text("x")
    (made / ".job.sbatch.9xojesci").write_text("x")  # half of it is there
    monkeypatch.setenv("NEXA_HOME", str(root / "mine"))
    settings.cache_clear()
    assert files(sync_repository(tmp_path / "there", root=root)) == {"train.py"}
    monkeypatch.setenv("NEXA_HOME", str(root))
    settings.cache_clear()
    assert "train.py" in files(sync_repository(tmp_path / "there", root=root))


def test_too_much_code_is_refused_and_the_largest_named(repository: Path, tmp_path: Path) -> None:
    (repository / "weights.bin").write_bytes(b"0" * (2 * 2**20))
    with pytest.raises(SyncError, match=r"weights.bin \(2 MiB\).*sync.exclude"):
        sync_repository(tmp_path / "there", root=repository, rules=SyncRules(max_mib=1))
    assert not (tmp_path / "there").exists()


def test_a_folder_without_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SyncError, match="there is no code"):
        sync_repository(tmp_path / "there", root=tmp_path / "empty")


@pytest.mark.parametrize(
    ("destination", "login", "path"),
    [
        ("host:path", Login("host"), "path"),
        ("ada@host:/a path", Login("host", "ada"), "/a path"),
        ("ada@example.org@host:~/x:y", Login("host", "ada@example.org"), "~/x:y"),
        ("host:.", Login("host"), "."),
        ("ada@[fe80::1]:a\nb", Login("fe80::1", "ada"), "a\nb"),
    ],
)
def test_a_colon_before_the_first_slash_ends_the_name_of_a_host(destination: str, login: Login, path: str) -> None:
    host, found = _read(destination)
    assert isinstance(host, SshHost)
    assert (host.login, found) == (login, path)


@pytest.mark.parametrize("destination", ["./host:path", "/a:b", "path", Path("host:path")])
def test_other_destinations_are_on_this_machine(destination: str | Path) -> None:
    host, found = _read(destination)
    assert not host.remote
    assert found == str(destination)


@pytest.mark.parametrize(
    "destination", ["host:", ":path", "@host:path", "-oX=y:path", "a@:x", "host::module", "ssh://h/p"]
)
def test_a_destination_that_makes_no_sense_is_one_clear_error(repository: Path, destination: str) -> None:
    with pytest.raises(SyncError, match=re.escape(repr(destination))):
        sync_repository(destination, root=repository)


def tree(root: Path) -> Path:
    """A folder of what a digest may stumble over."""
    root.mkdir()
    hostile = [b"a b", b"new\nline", b"-dash", b"it's", b'"', b"back\\slash", b"#comment", b"\xff\xfe", b"\r", b"*"]
    for name in hostile:
        folder = root / os.fsdecode(name)
        folder.mkdir()
        (folder / folder.name).write_bytes(name * 1000)
        (folder / "link").symlink_to(folder.name + "\n")
    for mode in (0o644, 0o755, 0o4755, 0o600, 0o401, 0o444):
        (root / f"mode-{mode:o}").write_text("x")
        (root / f"mode-{mode:o}").chmod(mode)
    (root / "empty").touch()
    (root / "large").write_bytes(os.urandom(300_000))
    (root / "dangling").symlink_to("/nowhere")
    (root / "folder").symlink_to("a b")
    return root


def files_in(root: Path) -> list[str]:
    return [name for name, _ in selection._walked(root)]


def test_a_host_without_python_computes_the_same_hash(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree")
    script = f'{snapshots_module.DIGEST}\nlist >../list && digest ../list && printf %s "$found"'
    done = subprocess.run(["sh", "-c", script], cwd=root, capture_output=True, check=True, text=True)
    assert (done.stdout, done.stderr) == (tree_hash(root, files_in(root)), "")
    listed = hashlib.sha256((tmp_path / "list").read_bytes()).hexdigest()
    assert listed == names_hash(files_in(root))


@pytest.mark.parametrize(
    "change",
    [
        "echo y >empty",
        "chmod +x empty",
        "rm empty",
        "mv empty other",
        "ln -sfn /elsewhere dangling",
        "touch more",
        "ln -sf empty large",
    ],
)
def test_the_hash_is_that_of_names_modes_contents_and_links(tmp_path: Path, change: str) -> None:
    root = tree(tmp_path / "tree")
    before = tree_hash(root, files_in(root))
    assert tree_hash(root, reversed(files_in(root))) == before
    subprocess.run(["sh", "-c", change], cwd=root, check=True)
    assert tree_hash(root, files_in(root)) != before


def test_a_folder_stands_for_its_files_where_all_of_them_travel(tmp_path: Path) -> None:
    for name in ("a/b/one", "a/b/two", "a/three", "c/four", "c/noise.log", "d/e/five", "six"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "d" / "void").mkdir()
    code = [name for name in files_in(tmp_path) if name != "c/noise.log"]
    assert selection.whole_folders(tmp_path, code) == ["a", "c/four", "d/e", "six"]
    (tmp_path / "c" / "noise.log").unlink()
    (tmp_path / "d" / "void").rmdir()
    assert selection.whole_folders(tmp_path, code) == ["."]


def test_a_file_that_appears_while_a_folder_is_copied_does_not_travel(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = LocalHost.rsync

    def late(self: LocalHost, *arguments: Any, **more: Any) -> None:
        (repository / "pkg" / "late.log").write_text("ignored, and in a folder of which all travels")
        copy(self, *arguments, **more)

    monkeypatch.setattr(LocalHost, "rsync", late)
    assert "pkg/late.log" not in files(sync_repository(tmp_path / "there", root=repository))
    assert not stagings(tmp_path / "there")


def test_code_that_changes_while_it_is_copied_makes_no_snapshot(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = LocalHost.rsync

    def changing(self: LocalHost, *arguments: Any, **more: Any) -> None:
        (repository / "train.py").write_text("print('HELLO')\n")
        copy(self, *arguments, **more)

    monkeypatch.setattr(LocalHost, "rsync", changing)
    with pytest.raises(SyncError, match=r"changed while it was copied \(train.py\)"):
        sync_repository(tmp_path / "there", root=repository)
    assert not snapshots(tmp_path / "there")
    assert not stagings(tmp_path / "there")


def test_a_snapshot_that_is_removed_meanwhile_is_made_anew(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Path(sync_repository(tmp_path / "there", root=repository).path)
    take = snapshots_module.claim

    def just_too_late(*arguments: Any) -> snapshots_module.Claim:
        with sync_module.snapshots_locked(first.parent):
            first.rename(first.with_name(f".deleting-{first.name}"))
        return take(*arguments)

    monkeypatch.setattr(sync_module, "claim", just_too_late)
    sync_repository(tmp_path / "there", root=repository)
    assert (first / "train.py").read_text() == "print('hello')\n"


def test_a_snapshot_of_an_earlier_version_is_verified_before_it_is_used(repository: Path, tmp_path: Path) -> None:
    first = sync_repository(tmp_path / "there", root=repository)
    shutil.rmtree(tmp_path / "there" / "snapshots" / ".verified")
    (Path(first.path) / "train.py").write_text("print('spoilt')\n")
    (Path(first.path) / "output.txt").write_text("a trial's")
    assert sync_repository(tmp_path / "there", root=repository).hash == first.hash
    assert (Path(first.path) / "train.py").read_text() == "print('hello')\n"
    assert (Path(first.path) / "output.txt").read_text() == "a trial's"


def test_the_patch_is_that_of_git_diff(repository: Path, tmp_path: Path) -> None:
    (repository / "train.py").write_bytes(b"print('dirty')\r\n\r\n")
    diff = subprocess.check_output(["git", "-C", str(repository), "diff", "--binary", "HEAD"])
    assert sync_repository(tmp_path / "there", root=repository).patch == hashlib.sha256(diff).hexdigest()


def test_a_detached_head_has_no_branch_and_a_new_repository_no_commit(repository: Path, tmp_path: Path) -> None:
    git(repository, "checkout", "--quiet", "--detach")
    detached = sync_repository(tmp_path / "there", root=repository)
    assert (detached.commit, detached.branch) == (git(repository, "rev-parse", "HEAD"), None)
    new = tmp_path / "new"
    new.mkdir()
    git(new, "init", "--quiet", "--initial-branch=trunk")
    (new / "train.py").touch()
    made = sync_repository(tmp_path / "there", root=new)
    assert (made.commit, made.branch, made.dirty, made.patch) == (None, "trunk", True, None)


def test_a_pipe_among_the_code_is_one_clear_error(repository: Path, tmp_path: Path) -> None:
    (repository / "train.py").unlink()
    os.mkfifo(repository / "train.py")
    with pytest.raises(SyncError, match=r"train.py is neither a file nor a link.*sync.exclude"):
        sync_repository(tmp_path / "there", root=repository)


def test_a_folder_with_something_in_it_gets_no_gitignore(repository: Path, tmp_path: Path) -> None:
    sync_repository(tmp_path / "new", root=repository)
    assert (tmp_path / "new" / ".gitignore").read_text() == "*\n"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine.txt").touch()
    sync_repository(tmp_path / "old", root=repository)
    assert not (tmp_path / "old" / ".gitignore").exists()


def test_names_that_a_shell_would_take_apart_travel(repository: Path, tmp_path: Path) -> None:
    odd = ["a b.py", "new\nline.py", "-dash.py", "quote'.py", "日本.py", "glob*.py", "#a.py", ";b.py", "c\rd", "\udcff"]
    for name in odd:
        (repository / name).write_text("x")
    assert set(odd) <= files(sync_repository(tmp_path / "there", root=repository))
