"""The verbs, as a user meets them: what is printed where, and the exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.__main__ import main
from nexa_infra.operations import manage, steps
from nexa_infra.runs.directory import mark_cancelled
from nexa_infra.runs.index import known_runs
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import Submission, write_submission
from nexa_infra.scheduling.local import is_supervised
from nexa_infra.settings import settings
from nexa_infra.spec.run import SweepConfig

# Trial 2 fails unless it is mended; each says something, and measures something.
SCRIPT = """
echo "out $1"; echo "err $1" >&2
echo "{\\"loss\\": 0.$1}" > "$NEXA_METRICS"
[ "$1" != 2 ] || [ -e "$NEXA_RUN_DIR/mended" ] || { echo "no such layer" >&2; exit 3; }
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with a sweep that fails, one that succeeds, one that lasts, and a training."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NEXA_POLL_SECONDS", "0.05")
    write("fails.yaml", "fails", SCRIPT, sweep={"parameters": {"n": ["0", "1", "2"]}})
    write("works.yaml", "works", SCRIPT, sweep={"parameters": {"n": ["0", "1", "3"]}})
    write("lasts.yaml", "lasts", 'echo "hello $1"; sleep 300', sweep={"parameters": {"n": ["0", "1"]}})
    write("one.yaml", "one", SCRIPT.replace("$1", "7"), training={"parameters": {}})
    return folder


def write(name: str, job: str, script: str, **trials: Any) -> None:
    placed = ["{n}"] if "sweep" in trials else []
    config = {
        "job": {"name": job, "array_parallelism": 2, "time": "1:00"},
        "launcher": {"type": "command", "command": ["bash", "-c", script, "trial", *placed]},
        "objective": {"metric": "loss", "goal": "min"},
        **trials,
    }
    Path(name).write_text(json.dumps(config))


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "nexa_infra", *words]


def verb(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=60, **options)
    assert "Traceback" not in done.stderr, done.stderr
    return done


Here = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """A verb in this process, which is quicker: for the many things that are said before anything is done."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            settings.cache_clear()
            with pytest.raises(SystemExit) as end:
                main(list(words))
        settings.cache_clear()
        code = end.value.code
        assert isinstance(code, int)
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return run


def started(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def only_run() -> Run:
    (entry,) = known_runs(manage.home())
    return manage.find(entry.id)


def wait_for(what: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def is_going() -> bool:
    return bool(known_runs(manage.home())) and any(only_run().files.trials.glob("*/attempt-1.out"))


@pytest.fixture
def lasting() -> Iterator[tuple[subprocess.Popen[str], Run]]:
    """A run whose trials go on, and its client."""
    client = started("sweep", "lasts.yaml")
    try:
        wait_for(is_going)
        yield client, only_run()
    finally:
        client.kill()
        client.communicate()


def a_run(name: str = "made", hour: int = 10, states: str = "CCF") -> Run:
    """A run as it stands on disk once its trials have ended so: completed, failed, or never started (`-`)."""
    config = SweepConfig.model_validate(
        {
            "job": {"name": name},
            "launcher": {"type": "command", "command": ["true"]},
            "sweep": {"parameters": {"n": [str(n) for n in range(len(states))]}},
            "objective": {"metric": "loss", "goal": "min"},
        }
    )
    moment = datetime(2026, 11, 24, hour, tzinfo=UTC)
    run = steps.render(steps.sync(steps.plan(config, moment=moment, token="abcd")))
    files = run.files
    token = f"nexa-{run.id}-1"
    write_submission(
        files, Submission(number=1, token=token, trials=len(states), array="0", created_at=moment, job_id="77")
    )
    journal = [f"array\t77\t{len(states)}"]
    for trial, state in enumerate(states):
        if state == "-":
            continue
        code = 0 if state == "C" else 3
        (files.status / f"77_{trial}").write_text(
            f"start\t{trial}\t1\t1000\tn1\nend\t{trial}\t1\t{1010 + trial}\t{code}\t\n"
        )
        files.trial(trial).mkdir()
        files.metrics(trial).write_text(json.dumps({"loss": (trial + 1) / 10}))
        files.stdout(trial, 1).write_text(f"out {trial}\n")
        files.stderr(trial, 1).write_text(f"no such layer {trial}\n" if code else "")
        journal += [f"start\t{trial}\t1000", f"end\t{trial}\t{'FAILED' if code else 'COMPLETED'}\t{code}\t1010"]
    (files.submissions / "1.journal").write_text("\n".join([*journal, "over", ""]))
    return run


# ---- sweep and train ----


def test_a_sweep_ends_with_its_report_on_stdout_and_its_progress_on_stderr() -> None:
    done = verb("sweep", "works.yaml")
    run = only_run()
    assert done.returncode == 0
    assert done.stdout.startswith("Sweep works: done\n  3 of 3 trials completed\n")
    assert run.id in done.stdout and "Best by loss (min)" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80 or run.directory in done.stdout
    progress = done.stderr.splitlines()
    assert progress[0] == f"run {run.id}: 3 trials, at most $0.0026"
    assert re.fullmatch(r"3/3 trials over in \d+ s: 3 completed", progress[-1])
    assert "\x1b" not in done.stderr, "a file gets no terminal's codes"


def test_a_failed_sweep_shows_its_report_then_its_error_and_is_retried() -> None:
    done = verb("sweep", "fails.yaml")
    run = only_run()
    assert done.returncode == 1
    assert done.stdout.startswith("Sweep fails: failed\n  2 of 3 trials completed, 1 failed\n")
    assert f"run {run.id} failed: 1 of 3 trials did not complete" in done.stderr
    assert "no such layer" in done.stderr
    assert f"`nexa-infra retry {run.id}` runs only these again" in done.stderr
    (run.files.path / "mended").touch()
    again = verb("retry", "latest")
    assert again.returncode == 0
    assert again.stdout.startswith("Sweep fails: done\n  3 of 3 trials completed\n")


def test_a_preview_starts_nothing_and_says_nothing_else(home: Path) -> None:
    done = verb("sweep", "works.yaml", "--preview", "--set", "job.time=00:02:00")
    assert done.returncode == 0 and done.stderr == ""
    assert "3 trials, not submitted" in done.stdout
    assert "#SBATCH --time=00:02:00" in done.stdout
    assert not home.exists()
    assert "1 trial, not submitted" in verb("train", "one.yaml", "--preview").stdout
    assert not home.exists()


def test_a_training_shows_its_own_report_whatever_runs_beside_it() -> None:
    later = a_run(hour=23)  # the newest by its id, all the time
    done = verb("train", "one.yaml")
    assert done.returncode == 0
    assert done.stdout.startswith("Training one: done\n")
    run = next(manage.find(entry.id) for entry in known_runs(manage.home()) if entry.id != later.id)
    assert run.id in done.stdout and later.id not in done.stdout
    assert json.loads((run.files.path / "artifact.json").read_text())["metrics"] == {"loss": 0.7}


def test_a_training_is_copied_where_it_is_asked_for(tmp_path: Path) -> None:
    done = verb("train", "one.yaml", "--fetch-to", str(tmp_path / "out"))
    copy = tmp_path / "out" / only_run().id
    assert done.returncode == 0 and done.stdout.endswith(f"{copy}\n")
    assert json.loads((copy / "trials" / "0" / "metrics.json").read_text()) == {"loss": 0.7}


def test_a_run_over_its_budget_shows_its_report_and_ends_with_3() -> None:
    done = verb("sweep", "works.yaml", "--budget", "0.0001")
    assert done.returncode == 3
    assert done.stdout.startswith("Sweep works: refused\n  Nothing was submitted")
    assert f"run {only_run().id} was refused, nothing was started" in done.stderr
    assert verb("resume", "latest").returncode == 1


# ---- runs that are ended ----


@pytest.mark.parametrize(
    ("number", "code", "end", "said"),
    [
        (signal.SIGINT, 130, "cancelled", "cancelled: nothing of it is left running here; `nexa-infra resume"),
        (signal.SIGTERM, 143, "unfinished", "ended by SIGTERM; `nexa-infra resume"),
    ],
)
def test_a_signal_ends_the_run_with_its_report_and_how_to_go_on(
    lasting: tuple[subprocess.Popen[str], Run], number: signal.Signals, code: int, end: str, said: str
) -> None:
    client, run = lasting
    client.send_signal(number)
    out, err = client.communicate(timeout=20)
    assert client.returncode == code
    assert out.startswith(f"Sweep lasts: {end}\n")
    assert err.splitlines()[-1].startswith(said) and run.id in err
    assert "Traceback" not in err
    assert not is_supervised(run.files)


def test_a_run_is_cancelled_from_elsewhere(lasting: tuple[subprocess.Popen[str], Run]) -> None:
    client, run = lasting
    told = verb("status", "latest").stdout
    assert told.startswith("Sweep lasts: running\n") and "2: 2 running" in told and f"cancel {run.id}" in told
    assert re.search(rf"{run.id}  running\s+0/2 ", verb("status").stdout)
    assert "still running" in verb("retry", run.id).stderr
    done = verb("cancel", run.id)
    assert done.returncode == 0 and f"Run {run.id} is cancelled" in done.stdout
    out, err = client.communicate(timeout=20)
    assert client.returncode == 130
    assert out.startswith("Sweep lasts: cancelled\n") and "was cancelled (cancelled by hand)" in err
    again = verb("cancel", run.id)
    assert again.returncode == 1 and "has already ended (cancelled)" in again.stderr


def test_resume_goes_on_at_once_where_a_killed_client_is_still_being_swept_up_after() -> None:
    """The supervisor gives the trials time to end: a client that comes meanwhile runs them itself afterwards."""
    stubborn = 'trap "" TERM; [ "$NEXA_ATTEMPT" = 2 ] || sleep 300'
    write("stubborn.yaml", "stubborn", stubborn, sweep={"parameters": {"n": ["0", "1"]}})
    client = started("sweep", "stubborn.yaml")
    wait_for(is_going)
    client.kill()
    client.communicate()
    assert is_supervised(only_run().files), "it ended at once, so nothing is tested"
    done = verb("resume", "latest")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "Sweep stubborn: done")


def test_a_word_that_comes_when_every_trial_has_ended_cancels_nothing(here: Here) -> None:
    run = a_run(states="CC")
    mark_cancelled(run.files, "Ctrl-C", by="person")
    assert here("status", run.id).stdout.startswith("Sweep made: done\n")
    assert here("report", run.id).stdout.startswith("Sweep made: done\n")


NOTEBOOK = """
import asyncio
from nexa_infra import launch_slurm_sweep

async def cell():
    launch_slurm_sweep("lasts.yaml", submit=True)

try:
    asyncio.new_event_loop().run_until_complete(cell())
except KeyboardInterrupt:
    print("interrupted", flush=True)
input()  # a notebook's kernel lives on
"""


def test_ctrl_c_in_a_notebook_cancels_the_run_though_its_kernel_lives_on() -> None:
    kernel = subprocess.Popen(
        [sys.executable, "-c", NOTEBOOK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        wait_for(is_going)
        run = only_run()
        kernel.send_signal(signal.SIGINT)
        assert kernel.stdout is not None and kernel.stdout.readline() == "interrupted\n"
        assert kernel.poll() is None and not is_supervised(run.files)
        assert manage.status(run).end == "cancelled"
    finally:
        kernel.kill()
        kernel.communicate()


# ---- looking ----


def test_a_home_without_runs_says_how_to_start(here: Here) -> None:
    done = here("status")
    assert done.returncode == 0 and "start one with `nexa-infra sweep FILE`" in done.stdout
    assert here("report").returncode == 2


def test_status_is_a_table_with_a_line_a_run_and_a_page_of_one(here: Here) -> None:
    failed, left = a_run(hour=10), a_run("left-over", hour=11, states="C--")
    header, *lines = here("status").stdout.splitlines()
    assert header.split() == ["Run", "End", "Done", "Failed", "USD", "Age"]
    assert [line.split()[:4] for line in lines] == [
        [left.id, "unfinished", "1/3", "0"],
        [failed.id, "failed", "2/3", "1"],
    ]
    page = here("status", failed.id).stdout
    assert page.startswith("Sweep made: failed\n")
    for told in (failed.directory, "3: 2 completed, 1 failed", "  2: failed, exit code 3: n=2", "| no such layer 2"):
        assert told in page
    assert f"nexa-infra retry {failed.id}" in page
    assert f"nexa-infra resume {left.id}" in here("status", left.id).stdout


def test_a_damaged_run_does_not_hide_the_others(here: Here) -> None:
    good, bad, worse = a_run(hour=10), a_run("bad", hour=11), a_run("worse", hour=12)
    bad.files.record.write_text('{"id": "')
    worse.files.submission(1).write_text("{")
    done = here("status")
    assert done.returncode == 0
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        [worse.id, "damaged"],
        [bad.id, "damaged"],
        [good.id, "failed"],
    ]
    assert str(bad.files.record) in done.stderr and "damaged" in done.stderr
    for words in (
        ["status", bad.id],
        ["report", bad.id],
        ["resume", bad.id],
        ["logs", bad.id, "0"],
        ["status", worse.id],
    ):
        one = here(*words)
        assert one.returncode == 1 and one.stdout == "" and len(one.stderr.splitlines()) == 1


def test_a_report_is_shown_as_text_and_as_json_and_looking_does_not_touch_it(here: Here) -> None:
    run = a_run()
    assert here("report").stdout.startswith("Sweep made: failed\n"), "a run whose client was killed gets its report"
    written = run.files.report_json.stat().st_mtime_ns
    told = json.loads(here("report", run.id, "--json").stdout)
    assert told["run_id"] == run.id and told["end"] == "failed"
    here("compare", run.id, run.id)
    assert run.files.report_json.stat().st_mtime_ns == written
    assert told == json.loads(run.files.report_json.read_text())


def test_status_goes_by_the_report_only_as_long_as_nothing_has_happened_since(here: Here) -> None:
    run = a_run()
    files = run.files
    here("report", run.id)
    assert "2/3       1" in here("status").stdout
    (files.status / "78_0").write_text("start\t2\t2\t2000\tn1\nend\t2\t2\t2010\t0\t\n")
    (files.submissions / "2.trials").write_text("2 2\n")
    (files.submissions / "2.journal").write_text("array\t78\t1\nstart\t0\t2000\nend\t0\tCOMPLETED\t0\t2010\nover\n")
    again = Submission(
        number=2,
        token=f"nexa-{run.id}-2",
        trials=1,
        array="0",
        listed="submissions/2.trials",
        created_at=run.created_at,
        job_id="78",
    )
    write_submission(files, again)
    assert re.search(rf"{run.id}  done\s+3/3       0", here("status").stdout)


def test_two_runs_are_compared_in_sum_and_trial_by_trial() -> None:
    left, right = a_run("left", hour=10), a_run("right", hour=11, states="CCCC")
    right.files.metrics(1).write_text('{"loss": 0.15}')
    done = verb("compare", left.id, right.id)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 80
    assert ["failed", "done", "end"] in lines
    assert ["2", "4", "+2", "completed"] in lines
    assert ["0.1", "0.1", "0", "best", "loss"] in lines
    assert "3 trials in both, 0 only left, 1 only right" in done.stdout
    assert next(line for line in lines if line[-1:] == ["n=1"])[:3] == ["0.2", "0.15", "-0.05"]
    assert next(line for line in lines if line[-1:] == ["n=3"])[:2] == ["-", "0.4"]


# ---- logs ----


def test_logs_show_what_a_trial_and_what_the_array_script_printed(here: Here) -> None:
    run = a_run()
    assert here("logs", run.id, "1").stdout == "out 1\n"
    assert here("logs", run.id, "2", "--stderr").stdout == "no such layer 2\n"
    assert here("logs", run.id, "2", "--attempt", "1", "-f").stdout == "out 2\n", "what has ended is not waited for"
    silent = here("logs", run.id)
    assert (silent.returncode, silent.stdout) == (0, "") and "the array script" in silent.stderr
    run.files.log.write_text("job.sbatch: there is no trial 9 among 3\n")
    assert here("logs", run.id).stdout == "job.sbatch: there is no trial 9 among 3\n"


def test_a_trial_that_never_started_and_never_will_is_not_waited_for() -> None:
    run = a_run(states="C-")
    done = verb("logs", run.id, "1", "-f")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"trial 1 of run {run.id} has not started\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["3"], "has trials 0 to 2: there is no trial 3"),
        (["-1"], "there is no trial -1"),
        (["1", "--attempt", "2"], "trial 1 of run .* has no attempt 2: it has 1"),
        (["--stderr"], "name one"),
        (["one"], 'unable to convert "one" into int'),
    ],
)
def test_logs_of_what_is_not_there_say_what_is(words: list[str], said: str, here: Here) -> None:
    run = a_run()
    done = here("logs", run.id, *words)
    assert done.returncode == 2 and done.stdout == ""
    assert re.search(said, done.stderr)


def test_logs_follow_a_trial_from_before_its_start_to_its_end() -> None:
    first = 'while [ $1 = 0 ] && [ ! -e "$NEXA_RUN_DIR/go" ]; do sleep 0.05; done'
    script = f'{first}; for i in 1 2 3; do echo "$1 $i"; sleep 0.2; done'
    write("slow.yaml", "slow", script, sweep={"parameters": {"n": ["0", "1", "2"]}})
    client = started("sweep", "slow.yaml", "--set", "job.array_parallelism=1")
    wait_for(is_going)
    run = only_run()
    assert "has not started yet: -f waits for it" in verb("logs", run.id, "1").stderr
    follower = started("logs", run.id, "1", "--follow")
    whole = started("logs", run.id, "-f")
    time.sleep(0.7)
    assert follower.poll() is None and whole.poll() is None, "they did not wait"
    (run.files.path / "go").touch()
    out, _ = follower.communicate(timeout=20)
    assert (follower.returncode, out) == (0, "1 1\n1 2\n1 3\n")
    assert client.poll() is None, "it ended with the trial, not with the run"
    client.communicate(timeout=20)
    assert whole.communicate(timeout=20)[0] == "" and whole.returncode == 0


def test_a_follower_that_is_interrupted_says_nothing_and_ends_nothing(
    lasting: tuple[subprocess.Popen[str], Run],
) -> None:
    client, run = lasting
    follower = started("logs", run.id, "0", "-f")
    assert follower.stdout is not None and follower.stdout.readline() == "hello 0\n"
    follower.send_signal(signal.SIGINT)
    out, err = follower.communicate(timeout=20)
    assert (follower.returncode, out, err) == (130, "", "")
    assert client.poll() is None and is_supervised(run.files)


# ---- clean and doctor ----


def test_clean_says_what_it_would_remove_and_then_removes_it(here: Here) -> None:
    old, damaged = a_run(hour=9), a_run("damaged")
    damaged.files.record.write_text("{")
    said = here("clean", "--older", "0s", "--dry-run")
    assert said.returncode == 0
    assert re.search(rf"^run  .* KiB .* files .* {re.escape(old.directory)}$", said.stdout, re.MULTILINE)
    assert "1 to remove: " in said.stdout and "Nothing was removed" in said.stdout
    assert f"{damaged.directory} stays: " in said.stderr
    assert old.files.record.exists()
    done = here("clean", "--older", "0s")
    assert done.returncode == 0 and "1 removed: " in done.stdout
    assert not old.files.path.exists() and damaged.files.path.exists()
    assert here("clean").stdout == "Nothing to remove.\n"
    wrong = here("clean", "--older", "30 days")
    assert wrong.returncode == 2 and "'30 days' is no span of time: write 30d, 12h or 45m" in wrong.stderr


def test_doctor_finds_this_machine_fit_and_a_home_that_is_a_file_unfit(here: Here) -> None:
    assert here("doctor").stdout.count("ok ") >= 8
    Path("file").touch()
    done = here("doctor", NEXA_HOME="file")
    assert done.returncode == 1
    assert re.search(r"^NO  home .*Not a directory\n.*set NEXA_HOME", done.stdout, re.MULTILINE)


# ---- what a person can get wrong ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["sweep", "one.yaml"], "this is a training, not a sweep: use launch_training_job, or `nexa-infra train "),
        (["train", "works.yaml"], "this is a sweep, not a training: use launch_slurm_sweep, or `nexa-infra sweep "),
        (["sweep", "works.yaml", "--set", "job.time=8h"], "override job.time=8h: job.time: '8h' is not a walltime"),
        (["sweep", "works.yaml", "--set", "job"], "an override is written key=value"),
        (["sweep", "works.yaml", "--budget", "-1"], "0 or more"),
        (["sweep", "works.yaml", "--budget", "nan"], "0 or more"),
        (["sweep", "works.yaml", "--budget", "much"], 'unable to convert "much" into float'),
        (["sweep"], "FILE requires an argument"),
        (["sweeep", "works.yaml"], 'Unknown command "sweeep"'),
        (["status", "nope"], "there are no runs under"),
        (["cancel", "./nope"], "nope is not a run directory"),
        (["compare", "latest"], "RIGHT requires an argument"),
    ],
)
def test_what_is_not_understood_is_one_message_and_2_and_leaves_nothing(
    words: list[str], said: str, home: Path, here: Here
) -> None:
    done = here(*words)
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and len(done.stderr.splitlines()) <= 2
    assert not home.exists()


def test_a_name_that_fits_several_runs_lists_them(here: Here) -> None:
    runs = [a_run(hour=hour) for hour in (10, 11)]
    done = here("status", "made")
    assert done.returncode == 2 and all(run.id in done.stderr for run in runs)


@pytest.mark.parametrize(("name", "value"), [("NEXA_POLL_SECONDS", "abc"), ("NEXA_KILL_WAIT", "-3")])
def test_a_setting_that_makes_no_sense_is_named(name: str, value: str, here: Here) -> None:
    for words in (["status"], ["sweep", "works.yaml"]):
        done = here(*words, **{name: value})
        assert done.returncode == 2 and done.stdout == ""
        assert f"{name}" in done.stderr and value in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_home_that_cannot_be_used_is_named_with_the_systems_word(here: Here) -> None:
    Path("file").touch()
    for words in (["status"], ["sweep", "works.yaml"], ["clean"]):
        done = here(*words, NEXA_HOME="file")
        assert done.returncode == 1 and done.stdout == ""
        assert re.fullmatch(r".*/project/file/\S+: Not a directory", done.stderr.splitlines()[-1])


def test_a_missing_tool_is_named(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = verb("sweep", "works.yaml", env={**os.environ, "PATH": str(tmp_path / "bin")})
    assert done.returncode == 1 and "rsync" in done.stderr


def test_help_and_version_are_told() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", verb("--version").stdout)
    told = verb("--help").stdout
    verbs = "sweep extend train status logs cancel throttle resume retry report fetch compare clean doctor"
    assert re.findall(r"│ ([a-z]+) ", told) == verbs.split()
    assert "--dry-run" in verb("clean", "--help").stdout


# ---- streams ----


def test_a_reader_that_goes_away_is_no_error() -> None:
    for hour in range(20):
        a_run(hour=hour, states="C")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command("status"), stdout=writer, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (141, "")
    finally:
        os.close(writer)


@pytest.mark.parametrize("closed", ["pipe", "none"])
def test_a_run_whose_readers_have_gone_runs_to_its_end_all_the_same(closed: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        if closed == "pipe":
            done = subprocess.run(command("sweep", "fails.yaml"), stdout=writer, stderr=writer)
        else:
            done = subprocess.run(["bash", "-c", 'exec "$@" >&- 2>&-', "bash", *command("sweep", "fails.yaml")])
    finally:
        os.close(writer)
    assert done.returncode == 1
    assert json.loads(only_run().files.report_json.read_text())["states"] == {"completed": 2, "failed": 1}


def test_characters_that_an_encoding_lacks_are_replaced() -> None:
    done = verb("sweep", "works.yaml", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "3 trials ? 1 attempt" in done.stdout


# ---- a terminal ----


def in_a_terminal(*words: str, columns: int = 80, ctrl_c: Callable[[], bool] | None = None) -> tuple[int, str]:
    """Run a verb in a pseudo-terminal; return its exit code, and everything that was written to it."""
    leader, follower = pty.openpty()
    ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "COLUMNS"}}
    process = subprocess.Popen(
        command(*words),
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**environment, "TERM": "xterm-256color"},
        start_new_session=True,
        preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - nothing here has threads
    )
    os.close(follower)
    written = b""
    deadline = time.monotonic() + 30
    try:
        while time.monotonic() < deadline:
            if select.select([leader], [], [], 0.05)[0]:
                try:
                    piece = os.read(leader, 65536)
                except OSError:
                    break
                if not piece:
                    break
                written += piece
            if ctrl_c is not None and ctrl_c():
                ctrl_c = None
                os.write(leader, b"\x03")
        return process.wait(10), written.decode()
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def screen(written: str) -> list[str]:
    """What a terminal shows in the end, of the few codes that are used."""
    lines, row, column = [""], 0, 0
    for found in re.finditer(r"\x1b\[(\??[\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)", written):
        number, code, move, text = found.groups()
        match code or move:
            case "A":
                row -= int(number or 1)
            case "K":
                lines[row] = ""
            case "m" | "h" | "l":
                pass
            case "\r":
                column = 0
            case "\n":
                row += 1
                lines.extend([""] * (row + 1 - len(lines)))
            case None:
                lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
                column += len(text)
            case _:
                pytest.fail(f"a code that is not known here: {found[0]!r}")
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("columns", [80, 40])
def test_progress_is_one_line_that_updates_and_is_gone_at_the_end(columns: int) -> None:
    code, written = in_a_terminal("sweep", "fails.yaml", columns=columns)
    run = only_run()
    assert code == 1
    progress = [
        line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", written)) if "trials ━" in line
    ]
    assert len(progress) > 2 and all(len(line) <= columns for line in progress)
    assert any("3/3" in line for line in progress)
    shown = screen(written)
    assert shown[0] == f"run {run.id}: 3 trials, at most $0.0026"
    assert shown[1] == "Sweep fails: failed", "the progress line is gone"
    assert not any("━" in line for line in shown)
    assert "\x1b[?25h" in written, "the cursor is shown again"


def test_ctrl_c_in_a_terminal_cancels_and_shows_the_report() -> None:
    code, written = in_a_terminal("sweep", "lasts.yaml", ctrl_c=is_going)
    shown = screen(written)
    assert code == 130
    assert "Sweep lasts: cancelled" in shown
    assert shown[-2].startswith("cancelled: nothing of it is left running here; `nexa-infra resume ")
    assert not is_supervised(only_run().files)
