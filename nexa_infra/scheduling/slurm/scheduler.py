"""Slurm as a scheduler of runs: one question a poll, on the login node or over SSH."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nexa_infra.errors import HostError, QueueFullError, RunNotFoundError, UnknownStateError
from nexa_infra.hosts.base import Host
from nexa_infra.hosts.framing import write_file, write_files
from nexa_infra.hosts.shell import join, quote
from nexa_infra.runs.attempts import TaskState, read_attempts
from nexa_infra.runs.directory import write_atomically
from nexa_infra.runs.ranks import candidates, read_gang, read_records
from nexa_infra.runs.submissions import Submission, read_submissions, to_json, write_submission
from nexa_infra.scheduling.arrays import Throttle
from nexa_infra.scheduling.base import Queue
from nexa_infra.scheduling.budget import read_limit
from nexa_infra.scheduling.slurm import brought, mirror, tasks
from nexa_infra.scheduling.slurm.client import SlurmClient, queue_command, read_answer, section, sections
from nexa_infra.scheduling.slurm.seen import (
    GOING,
    accounts_of,
    left_of,
    remember,
    seen_of,
    settled,
    states_of,
    submissions_of,
)
from nexa_infra.scheduling.slurm.steward_array import submit_steward, token_of
from nexa_infra.scheduling.slurm.submission import VOID, TakenError, leave, order_of, submit_once, submit_together
from nexa_infra.scheduling.slurm.tasks import Trials
from nexa_infra.scheduling.slurm.text import AccountingRow, moment, read_accounting

# How long what is cancelled may take to end: KillWait, epilogs, and a slow controller, seconds.
END_SECONDS = 180.0
# How long accounting may lag behind the queue, seconds.
LAG_SECONDS = 8.0

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run
    from nexa_infra.scheduling.base import Admission


@dataclass(frozen=True)
class SlurmScheduler:
    """Runs arrays on Slurm; they go on when their client ends."""

    host: Host
    patience: float = 14400.0  # how long a cluster that does not answer is waited for, seconds
    grace: float = 10.0  # the time between two look-ups of a lost answer, seconds

    @property
    def client(self) -> SlurmClient:
        """Slurm's commands there."""
        return SlurmClient(self.host)

    def check(self, run: Run) -> Admission:
        """Ask the cluster whether it can run the run; see `Scheduler.check`."""
        from nexa_infra.scheduling.slurm import site  # what is asked before a run needs more than a steward has

        return site.check(self.client, run)

    def prepare(self, run: Run) -> None:
        """Make the run directory there from the client's copy; see `Scheduler.prepare`."""
        if self.host.remote:
            done = self.client.ask(mirror.push_script(run))
            mirror.check_pushed(run, done.returncode, done.stderr)

    def submit(self, run: Run, submission: Submission) -> Submission | None:
        """Submit an array exactly once; see `Scheduler.submit`."""
        try:
            job = submit_once(
                self.client, run, submission, order_of(run, submission), patience=self.patience, grace=self.grace
            )
        except TakenError:
            self.poll(run)
            return read_submissions(run.files)[-1]
        except QueueFullError:
            self._record(run, replace(submission, void="full"))
            raise
        if job is None:
            self._record(run, replace(submission, void="lost"))
            return None
        answered = replace(submission, job_id=job)
        self._record(run, answered)
        return answered

    def submit_together(self, run: Run, submissions: Sequence[Submission]) -> list[Submission]:
        """See `Scheduler.submit_together`."""
        orders = [order_of(run, each) for each in submissions]
        ids = submit_together(self.client, run, submissions, orders)
        answered = [replace(each, job_id=job) for each, job in zip(submissions, ids)]
        # As for one: a record without its id is no harm.
        with suppress(HostError):
            records = {f"{each.number}.json": to_json(each).encode() for each in answered}
            self.client.ask(f"cd -- {quote(run.directory)} && {write_files('submissions', records)}")
        return answered

    def _record(self, run: Run, submission: Submission) -> None:
        """Write what became of a submission beside its intent, for whoever looks next."""
        record = to_json(submission).encode()
        void = ""
        if submission.void is not None:
            void = f" && {{ ln -sT -- void claims/{quote(submission.token)} 2>/dev/null || true; }}"
        # A record without its id is no harm: the id is found again by its name.
        with suppress(HostError):
            place = f"submissions/{submission.number}.json"
            self.client.ask(f"cd -- {quote(run.directory)} && {write_file(place, record)}{void}")

    def leave(self, run: Run) -> None:
        """See `Scheduler.leave`."""
        leave(run)

    def settle(self, run: Run, submission: Submission) -> Submission | None:
        """Find what became of an intent, or submit it now; see `Scheduler.settle`."""
        return self.submit(run, submission)

    def poll(self, run: Run, *, fresh: bool = False) -> Queue:
        """Ask squeue once, and bring the status files that have changed; see `Scheduler.poll`."""
        if run.files.refused.exists():
            return Queue(False)  # nothing of it is anywhere but here
        seen = seen_of(run)
        prefix = f"nexa-{run.id}-"
        text = f"cd -- {quote(run.directory)} 2>/dev/null || exit 66\ndate +%s\n"
        text += section("queue", queue_command(prefix, cache=_cache(run), age=0.0 if fresh else _shared_age(run)))
        text += section("cancelled", "cat cancelled 2>/dev/null")
        text += section("throttle", "cat throttle 2>/dev/null")
        text += section("claims", "readlink -- claims/* 2>/dev/null | sort -u")
        logs = self.host.remote and run.kind == "training"
        held = mirror.held_of(run) if logs else 0
        if logs:
            # Before the status files: of what it brings, the attempt is then known.
            text += section("log", mirror.log_piece(held, mirror.PIECE_BYTES))
        if self.host.remote:
            text += section("lines", brought.status_lines(seen.since)) + mirror.changed_records(seen.since)
        done = self.client.ask(text)
        if done.returncode == 66:
            raise RunNotFoundError(f"the run directory {run.directory} is not on {self.host.name} any more")
        told = mirror.unpack(run, done.stdout) if self.host.remote else done.stdout
        moment, _, rest = told.partition("\n")
        found = sections(rest)
        if "queue" not in found or not moment.isdigit():
            raise HostError(
                f"{self.host.name} did not answer as it should: {done.stderr.strip()[-300:] or told[-300:]}"
            )
        whole = True
        if self.host.remote:
            self._keep_cancelled(run, found["cancelled"])
            _keep_throttle(run, found["throttle"])
            whole = brought.keep_lines(run, seen.lines, found["lines"][0])
        if "log" in found:
            seen.behind = mirror.keep_log(run, held, found["log"][0])
        # An array whose id no client has recorded may be known by its claim alone.
        seen.owners = frozenset(re.findall(r"^(?:void-)?([0-9]+)$", found["claims"][0], re.MULTILINE))
        answer = read_answer(found["queue"], prefix)
        seen.calls["polls"] += 1
        seen.calls["shared" if answer.shared else "squeue"] += 1
        remember(run, answer.rows)
        seen.rows = answer.rows
        if whole:
            seen.since = float(moment)
        arrays = tasks.arrays_of(answer.rows, read_submissions(run.files))
        return replace(tasks.queue_of(answer.rows), arrays=arrays, queued=answer.queued, steward=answer.steward)

    def tasks(self, run: Run) -> dict[int, TaskState]:
        """Say how each trial's newest array task stood at the last poll; see `Scheduler.tasks`.

        Accounting is asked only about what has left the queue without a good end of its own.
        """
        seen = seen_of(run)
        if seen.rows is None and not self.poll(run).active and run.files.refused.exists():
            return {}
        rows = seen.rows or ()
        submissions = submissions_of(run)
        attempts = read_attempts(run.files)
        accounts = accounts_of(run)
        if read_limit(run.files.path / "steward") is not None:
            # What has ended well has a cost as well, which the budget is waiting for.
            over = {(trial, each.number) for trial, tried in attempts.items() for each in tried if each.ended}
            if unsettled := frozenset(over) - settled(submissions, accounts, attempts):
                accounts = self._ask_accounting(run, submissions, unsettled)
        found = states_of(run, submissions, rows, accounts, attempts)
        lacking = frozenset(tasks.unexplained(submissions, found, accounts, attempts))
        if lacking and (lacking != seen.asked or not tasks.queue_of(rows).active):
            wanted = frozenset((trial, attempts[trial][-1].number) for trial in lacking if attempts.get(trial))
            accounts = self._ask_accounting(run, submissions, wanted)
            seen.asked = lacking
            found = states_of(run, submissions, rows, accounts, attempts)
        return found

    def ends(self, run: Run) -> Mapping[tuple[int, int], str]:
        """See `Scheduler.ends`: by what accounting last said."""
        if not (accounts := accounts_of(run)):
            return {}
        found = tasks.charged(submissions_of(run), accounts, read_attempts(run.files))
        return {(trial, number): tasks.state_of(row) for trial, number, row in found if row.state not in GOING}

    def failures(self, run: Run) -> Sequence[tuple[str, float]]:
        """See `Scheduler.failures`: by what accounting last said."""
        gone = (row for row in accounts_of(run) if row.state in {"NODE_FAIL", "BOOT_FAIL"})
        return [(row.nodes, moment(row.ended) or 0.0) for row in gone if re.fullmatch(r"[\w.-]+", row.nodes)]

    def close(self, run: Run) -> bool:
        """Claim every token for nobody, unless the queue has something of the run; see `Scheduler.close`.

        Raises:
            UnknownStateError: whether it has cannot be said.
        """
        prefix = f"nexa-{run.id}-"
        text = f"cd -- {quote(run.directory)} || exit 66\n{VOID}"
        # Between the question and the claims no other client asks sbatch.
        text += "command exec 9>>submissions/.sbatch.lock && flock -w 20 9 || { echo busy; exit 0; }\n"
        text += f"nexa_prefix={quote(prefix)}\n{_CLOSE}"
        said = self.client.ask(text).stdout.split()
        if not said or said[0] in {"busy", "unknown"}:
            raise UnknownStateError(f"run {run.id}: whether anything of it waits or runs cannot be said")
        return said[0] == "closed"

    def throttle(self, run: Run, changes: Sequence[Throttle]) -> None:
        """Change arrays' limits, and what they wait for, in one question; see `Scheduler.throttle`."""
        tokens = {row.array_id: row.name for row in seen_of(run).rows or ()}
        records = {each.token: each for each in read_submissions(run.files)}
        lines, own = [], run.config.job.dependency
        for change in changes:
            record = records.get(tokens.get(change.array, ""))
            words = [f"JobId={change.array}", f"ArrayTaskThrottle={change.limit}"]
            if record is not None and record.after != change.after:
                waits = [*([own] if own else []), *([f"afterany:{change.after}"] if change.after else [])]
                words.append(f"Dependency={','.join(waits)}")
                changed = replace(record, after=change.after)
                write_submission(run.files, changed)
                self._record(run, changed)  # for whoever else follows the run
            lines.append(f"scontrol update {join(words)} || true")
        seen_of(run).calls["scontrol"] += len(lines)
        # Tasks that run already are no longer pending, and it says so of each: that is no failure.
        self.client.ask("\n".join(lines))

    def keep_throttle(self, run: Run, word: str) -> None:
        """See `Scheduler.keep_throttle`."""
        write_atomically(run.files.throttle, f"{word}\n")
        if self.host.remote:
            kept = write_file("throttle", f"{word}\n".encode())
            self.client.ask(f"cd -- {quote(run.directory)} && {kept}").check()

    def keep_steward(self, run: Run) -> None:
        """See `Scheduler.keep_steward`."""
        brief = json.loads((run.files.path / "steward" / "brief.json").read_bytes())
        submit_steward(self, run, brief)

    def counts(self, run: Run) -> Mapping[str, int]:
        """See `Scheduler.counts`."""
        return dict(seen_of(run).calls)

    def cancel(self, run: Run) -> None:
        """End the run's jobs by their ids, and wait until they have ended; see `Scheduler.cancel`.

        Every token is claimed by nobody first: what the scheduler starts all the same does nothing.

        Raises:
            UnknownStateError: nobody can say whether they have ended.
        """
        lines = [f"cd -- {quote(run.directory)} || exit 66", VOID]
        if run.files.cancelled.exists() and self.host.remote:
            lines.append("[ -e cancelled ] || " + write_file("cancelled", run.files.cancelled.read_bytes()))
        # An sbatch that is being asked at this moment is waited for; whoever comes later sees the word.
        lines.append("command exec 9>>submissions/.sbatch.lock && flock -w 20 9")
        lines.append('for nexa_intent in submissions/*.json; do [ -e "$nexa_intent" ] || continue')
        lines.append("  nexa_number=${nexa_intent##*/}; nexa_number=${nexa_number%.json}")
        lines.append(f"  void {quote(f'nexa-{run.id}-')}$nexa_number\ndone")
        if not run.labels.get("steward"):
            # A steward that ends its run ends itself when it has written the report.
            steward = quote(token_of(run.id, 0)[:-1])
            lines.append(f"nexa_ids=$(squeue -h -u \"$(id -un)\" -o '%F|%j' | awk -F'|' -v p={steward} \\")
            lines.append("  'index($2, p) == 1 { print $1 }' | sort -u)\n[ -z \"$nexa_ids\" ] || scancel $nexa_ids")
        self.client.ask("\n".join(lines))
        limit = time.monotonic() + END_SECONDS
        told: list[str] = []
        while self.poll(run, fresh=True).active:
            ids = sorted({row.array_id for row in seen_of(run).rows or ()})
            if ids != told:
                self.client.cancel(ids)
                told = ids
            if time.monotonic() > limit:
                raise UnknownStateError(
                    f"run {run.id}: its jobs {', '.join(ids)} have not ended {END_SECONDS:.0f} s after scancel; no "
                    f"more of it starts. `nexa-infra status {run.id}` shows how they stand"
                )
            time.sleep(0.5)

    def reopen(self, run: Run) -> None:
        """See `Scheduler.reopen`."""
        if self.host.remote:
            self.client.ask(f"cd -- {quote(run.directory)} && rm -f cancelled steward/over && true >reopened")
        run.files.cancelled.unlink(missing_ok=True)
        (run.files.path / "steward" / "over").unlink(missing_ok=True)
        run.files.reopened.touch()

    def bring(self, run: Run) -> None:
        """Bring states, metrics and accounting; see `Scheduler.bring`."""
        if run.files.refused.exists():
            return
        self.poll(run)
        # Of all the runs that a long-lived process has followed, the lines would add up; the copy has them.
        seen_of(run).lines.clear()
        if self.host.remote:
            done = self.client.ask(f"cd -- {quote(run.directory)} || exit 66\n{brought.metrics_files()}")
            brought.keep_metrics(run, done.stdout)
            self._bring_log(run)
        submissions = submissions_of(run)
        attempts = read_attempts(run.files)
        tried = frozenset((trial, each.number) for trial, several in attempts.items() for each in several)
        tried |= frozenset(tasks.unstarted(submissions, left_of(run), attempts))
        accounts = accounts_of(run)
        if tried - settled(submissions, accounts, attempts) or tasks.unexplained(submissions, {}, accounts, attempts):
            self._ask_accounting(run, submissions, tried)

    def bring_words(self, run: Run, failed: Sequence[tuple[int, int]]) -> None:
        """See `Scheduler.bring_words`."""
        lacking = [each for each in failed if each[1] and not run.files.tail(*each).exists()]
        if self.host.remote and lacking:
            mirror.keep_words(run, lacking, self.client.ask(mirror.words_script(run, lacking)).stdout)

    def bring_ranks(self, run: Run, failed: Sequence[tuple[int, int]]) -> None:
        """Bring what the nodes of failed gangs recorded, then the logs of the ranks in question."""
        lacking = [each for each in failed if each[1] and not run.files.rank_tails(*each).exists()]
        if not (self.host.remote and lacking):
            return
        mirror.keep_ranks(run, self.client.ask(mirror.records_script(run, lacking)).stdout)
        wanted = [
            (*each, end.rank)
            for each in lacking
            for end in candidates(read_gang(read_records(run.files.rank_tails(*each))))
        ]
        if wanted:
            mirror.keep_ranks(run, self.client.ask(mirror.logs_script(run, wanted)).stdout)

    def publish(self, run: Run) -> None:
        """See `Scheduler.publish`."""
        files = run.files
        written = [files.results, files.report_json, files.report_markdown, files.accounting, files.left]
        # The artifact last: where it is, all that it tells of is there.
        written += [files.stalls, *files.plots.glob("*.svg"), files.manifest, files.artifact]
        if self.host.remote and (there := [path for path in written if path.exists()]):
            self.client.ask(mirror.publish_script(run, there)).check()

    def ends_with_client(self, run: Run) -> bool:  # noqa: ARG002
        """See `Scheduler.ends_with_client`: only a person's word ends what runs on a cluster."""
        return False

    def _bring_log(self, run: Run) -> None:
        """Bring what the last poll has left of a training's metrics log."""
        seen = seen_of(run)
        while seen.behind:
            held = mirror.held_of(run)
            piece = section("log", mirror.log_piece(held, mirror.LAST_BYTES))
            found = sections(self.client.ask(f"cd -- {quote(run.directory)} || exit 66\n{piece}").stdout)
            seen.behind = "log" in found and mirror.keep_log(run, held, found["log"][0])

    def _keep_cancelled(self, run: Run, found: tuple[str, int]) -> None:
        if found[1] == 0 and found[0] and not run.files.cancelled.exists():
            write_atomically(run.files.cancelled, found[0] + "\n")

    def _ask_accounting(
        self, run: Run, submissions: Sequence[tuple[Submission, Trials]], wanted: frozenset[tuple[int, int]]
    ) -> list[AccountingRow]:
        """Ask sacct about the run's arrays, until it has caught up with the attempts that are wanted, or will not."""
        seen = seen_of(run)
        rows, recorded = seen.rows or (), {s.job_id for s, _ in submissions if s.job_id}
        ids = sorted(recorded | {row.array_id for row in rows} | seen.owners, key=int)
        if not ids:
            return []
        limit = time.monotonic() + LAG_SECONDS
        while True:
            seen_of(run).calls["sacct"] += 1
            text = self.client.accounting(ids)
            if text is None:
                return accounts_of(run)
            write_atomically(run.files.accounting, text)
            accounts = read_accounting(text)
            # While something runs, there is another time.
            known = settled(submissions, accounts, read_attempts(run.files))
            if wanted <= known or tasks.queue_of(rows).active or time.monotonic() > limit:
                return accounts
            time.sleep(0.5)


# Closes a run, unless the queue has something of it; `VOID` stands before it.
_CLOSE = """nexa_rows=$(squeue -h -u "$(id -un)" -o '%j') || { echo unknown; exit 0; }
case "
$nexa_rows" in *"
$nexa_prefix"*) echo active; exit 0 ;; esac
for nexa_intent in submissions/*.json; do [ -e "$nexa_intent" ] || continue
  nexa_number=${nexa_intent##*/}
  void "$nexa_prefix${nexa_number%.json}" || { echo unknown; exit 0; }
done
echo closed
"""


def _cache(run: Run) -> str:
    """Return where all runs of a workdir keep what squeue last said."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", run.cluster.name) if run.cluster else "here"
    return f"{run.workdir}/.squeue-{name}"


def _shared_age(run: Run) -> float:
    """Return how old an answer may be that another run was given, seconds: polls get no rarer by it."""
    return run.cluster.poll_floor / 2 if run.cluster else 0.0


def _keep_throttle(run: Run, found: tuple[str, int]) -> None:
    if found[1] == 0 and (not run.files.throttle.exists() or run.files.throttle.read_text().strip() != found[0]):
        write_atomically(run.files.throttle, found[0] + "\n")
