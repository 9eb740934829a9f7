"""Bringing the code over: what travels, what stays, and where it is put."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nexa_infra import sync_repository
from nexa_infra.errors import SyncError
from nexa_infra.runs.record import Snapshot
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
    snapshots = {path.name for path in (tmp_path / "there" / "snapshots").iterdir()}
    assert snapshots == {first.hash, other.hash}


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


def test_too_much_code_is_refused_and_the_largest_named(repository: Path, tmp_path: Path) -> None:
    (repository / "weights.bin").write_bytes(b"0" * (2 * 2**20))
    with pytest.raises(SyncError, match=r"weights.bin \(2 MiB\).*sync.exclude"):
        sync_repository(tmp_path / "there", root=repository, rules=SyncRules(max_mib=1))
    assert not (tmp_path / "there").exists()


def test_a_folder_without_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SyncError, match="there is no code"):
        sync_repository(tmp_path / "there", root=tmp_path / "empty")


@pytest.mark.parametrize("destination", ["host:path", "ada@host:/path"])
def test_another_host_is_named_as_what_this_version_does_not_do(repository: Path, destination: str) -> None:
    with pytest.raises(SyncError, match="on another host"):
        sync_repository(destination, root=repository)


def test_names_that_a_shell_would_take_apart_travel(repository: Path, tmp_path: Path) -> None:
    odd = ["a b.py", "new\nline.py", "-dash.py", "quote'.py", "日本.py", "glob*.py"]
    for name in odd:
        (repository / name).write_text("x")
    assert set(odd) <= files(sync_repository(tmp_path / "there", root=repository))
