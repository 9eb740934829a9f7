"""The example of DDP under torchrun itself: the same model on any number of processes, through warnings and kills."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import ROOT

if TYPE_CHECKING:
    import torch

TRAIN = ROOT / "deployments" / "examples" / "ddp" / "train.py"
EPOCHS, STEPS = 4, 10
TOTAL = EPOCHS * STEPS
PATIENCE = 120.0  # seconds, on a busy machine


@dataclass
class Launch:
    """One start of the example, in a folder that holds what it writes."""

    folder: Path
    processes: int = 2
    attempt: int = 1
    slow: bool = False
    restarts: int = 0
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        words = [str(TRAIN), f"--epochs={EPOCHS}", f"--steps-per-epoch={STEPS}"]
        words += ["--step-seconds=0.05"] if self.slow else []
        torchrun = [f"--nproc-per-node={self.processes}", f"--max-restarts={self.restarts}"]
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", *torchrun, *words]
        if self.processes == 1:
            argv = [sys.executable, *words]
        names = {"METRICS": "metrics.json", "METRICS_LOG": "metrics.jsonl", "CHECKPOINT_DIR": "kept", "TRIAL_DIR": "."}
        env = {f"NEXA_{name}": str(self.folder / file) for name, file in names.items()}
        env |= {"NEXA_ATTEMPT": str(self.attempt), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "SLURMD_NODENAME": "n7"}
        with self.output.open("wb") as stream:
            self.process = subprocess.Popen(
                argv, cwd=self.folder, env={**os.environ, **env}, stdout=stream, stderr=stream
            )

    @property
    def output(self) -> Path:
        return self.folder / f"attempt-{self.attempt}"

    @property
    def printed(self) -> str:
        return self.output.read_text()

    @property
    def executed(self) -> int:
        path = self.folder / "kept" / "executed"
        return path.stat().st_size if path.exists() else 0

    @property
    def metrics(self) -> dict[str, float]:
        found: dict[str, float] = json.loads((self.folder / "metrics.json").read_text())
        return found

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank, by the process id that it has printed first."""
        found = re.search(rf"^node n7 pid (\d+) rank {rank} of {self.processes}$", self.printed, re.MULTILINE)
        assert found is not None, self.printed
        os.kill(int(found[1]), number)

    def until(self, true: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not true():
            assert self.process.poll() is None and time.monotonic() < deadline, self.printed
            time.sleep(0.01)

    def end(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()


def parameters(launch: Launch) -> dict[str, torch.Tensor]:
    import torch

    found: dict[str, torch.Tensor] = torch.load(launch.folder / "model.pt", weights_only=True)
    return found


def difference(one: Launch, other: Launch) -> float:
    """Return the largest difference between the parameters that two starts have ended with."""
    left, right = parameters(one), parameters(other)
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """The training in one process, never interrupted: what all others are held against."""
    launch = Launch(tmp_path_factory.mktemp("alone"), processes=1)
    assert launch.end() == 0, launch.printed
    return launch


def test_two_processes_make_the_model_of_one_and_leave_what_a_run_reads(alone: Launch, tmp_path: Path) -> None:
    both = Launch(tmp_path / "both")
    assert both.end() == 0, both.printed

    assert difference(both, alone) <= 1e-6
    ranks = re.findall(r"^node n7 pid \d+ rank (\d) of 2$", both.printed, re.MULTILINE)
    assert sorted(ranks) == ["0", "1"]
    assert f"attempt 1 started at step 0 of {TOTAL}, steps executed in all {TOTAL}\n" in both.printed
    assert both.metrics == pytest.approx(alone.metrics, abs=1e-6)
    assert both.metrics["steps"] == TOTAL
    log = [json.loads(line) for line in (both.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["total_steps"]) for line in log] == [(step, TOTAL) for step in range(1, TOTAL + 1)]
    assert log[-1]["loss"] < log[0]["loss"] and {"lr", "seconds"} < log[0].keys()


def test_the_same_seed_makes_the_same_model_bit_for_bit(alone: Launch, tmp_path: Path) -> None:
    again = Launch(tmp_path / "again", processes=1)
    assert again.end() == 0, again.printed

    assert difference(again, alone) == 0.0
    assert again.metrics == alone.metrics


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warned_training_saves_its_step_and_goes_on_from_it(
    alone: Launch, tmp_path: Path, number: signal.Signals
) -> None:
    # SIGTERM is for one process here: torchrun would take it as the failure of a rank, and end the other by another.
    first = Launch(tmp_path / "warned", processes=2 if number == signal.SIGUSR1 else 1, slow=True)
    first.until(lambda: first.executed >= STEPS + 3)
    first.signal(first.processes - 1, number)
    first.signal(first.processes - 1, number)
    code = first.end()
    stopped = first.executed

    assert f"warned that time is up: step {stopped} of {TOTAL} is saved\n" in first.printed
    assert STEPS + 3 <= stopped < TOTAL and stopped % STEPS
    assert not (first.folder / "model.pt").exists() and not (first.folder / "metrics.json").exists()
    if first.processes == 1:
        assert code == 143
    else:
        assert code != 0
        assert re.findall(r"exitcode +: (-?\d+)", first.printed) == ["143", "143"]

    second = Launch(first.folder, processes=1, attempt=2)
    assert second.end() == 0, second.printed
    resumed = f"attempt 2 resumed at step {stopped} of {TOTAL}, steps executed in all"
    assert re.findall(rf"^{resumed} (\d+)$", second.printed, re.MULTILINE) == [str(stopped), str(TOTAL)]
    assert second.metrics["loss"] == pytest.approx(alone.metrics["loss"], abs=1e-6)
    assert difference(second, alone) <= 1e-6


def test_ranks_that_a_kill_took_with_them_do_the_lost_steps_again(alone: Launch, tmp_path: Path) -> None:
    first = Launch(tmp_path / "killed", slow=True, restarts=1)
    first.until(lambda: first.executed >= STEPS + 4)
    first.signal(1, signal.SIGKILL)
    assert first.end() == 0, first.printed

    found = re.findall(
        rf"^attempt 1 resumed at step (\d+) of {TOTAL}, steps executed in all (\d+) \(restart 1 by torchrun\)$",
        first.printed,
        re.MULTILINE,
    )
    (began, then), (_, in_all) = [(int(step), int(executed)) for step, executed in found]
    assert began >= STEPS and began % STEPS == 0
    assert then > began, "steps after the last checkpoint were lost"
    assert in_all == first.executed == TOTAL + then - began
    assert first.metrics["loss"] == pytest.approx(alone.metrics["loss"], abs=1e-6)
    assert difference(first, alone) <= 1e-6


def test_a_batch_that_cannot_be_split_evenly_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(sys, "argv", ["train.py", "--batch-size=256"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(TRAIN), run_name="__main__")

    assert "--batch-size 256 cannot be split evenly over 3 processes" in capsys.readouterr().err
