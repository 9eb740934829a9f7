"""Slurm: a sweep as one job array."""

from __future__ import annotations

import re
import secrets
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from nexa_infra.containers.chosen import container_of
from nexa_infra.errors import ConfigError, PriceError, Problem, SubmitError
from nexa_infra.hosts.local import LocalHost
from nexa_infra.hosts.shell import join
from nexa_infra.monitoring.costs import CostEstimate, estimate_batch_cost
from nexa_infra.monitoring.report import CostReport
from nexa_infra.monitoring.report_text import counted, money
from nexa_infra.runs.directory import RunDirectory
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import Submission
from nexa_infra.scheduling.arguments import array_spec, log_option
from nexa_infra.scheduling.base import Admission
from nexa_infra.scheduling.script import render_script, script_of, write_script
from nexa_infra.scheduling.torchrun import placement_of
from nexa_infra.spec.job import SlurmJob
from nexa_infra.spec.launcher import Launcher
from nexa_infra.spec.load import code_root, read_config
from nexa_infra.spec.run import SweepConfig, TrainingConfig
from nexa_infra.spec.sweep import SweepDefinition

# Trials that a preview shows, from the start and from the end.
SHOWN = 3


@dataclass(frozen=True)
class SlurmBatchArtifacts:
    """A sweep, ready to be submitted, or submitted: what it runs, where, and for how much."""

    run_id: str
    script_text: str
    array: str  # sbatch's --array
    trials: int
    shown: tuple[tuple[int, str], ...]  # the first and last trials: index, command line
    estimate: CostEstimate | None  # None where no price is known
    directory: Path | None = None  # None in a preview, which writes nothing
    submitted: bool = False
    job_ids: tuple[str, ...] = ()
    report: CostReport | None = None
    notes: tuple[str, ...] = ()  # what a person should know before it runs
    starts: str | None = None  # when the scheduler expects to start it
    placement: str = ""  # where a trial runs, and what starts it

    @property
    def script(self) -> Path | None:
        """The script, where it was written."""
        return RunDirectory(self.directory).script if self.directory else None

    @property
    def results(self) -> Path | None:
        """The trials' table, once the run has ended."""
        return RunDirectory(self.directory).results if self.directory and self.report else None

    @property
    def command(self) -> str | None:
        """The command that submits the script, for a person to run on the cluster."""
        if self.directory is None:
            return None
        return join(_sbatch(self.directory, self.array))


def prepare_slurm_batch(
    config: str | Path | SweepConfig | TrainingConfig | None = None,
    submit: bool = False,
    output_dir: str | Path | None = None,
    *,
    sweep: SweepDefinition | None = None,
    job: SlurmJob | None = None,
    launcher: Launcher | None = None,
    run_id: str | None = None,
) -> SlurmBatchArtifacts:
    """Write a self-contained array script, its tables beside it, into `output_dir`.

    Takes a config file, a config, or `sweep=` with `launcher=` and, optionally, `job=`. Without
    `output_dir`, that is job.output_dir or `.nexa/batches`, and in it a folder of the run's id. The
    trials run in the code where it stands: the folder of the config file's repository, or the
    working directory's. `submit=True` hands the script to this machine's sbatch.

    Raises:
        ConfigError: the config is not understood; nothing was written.
        SubmitError: sbatch is not here, or refused; the script stays.
    """
    file = Path(config).resolve() if isinstance(config, (str, Path)) else None
    if isinstance(config, (SweepConfig, TrainingConfig)):
        asked: SweepConfig | TrainingConfig = config
    elif file is not None:
        asked = read_config(file)
    elif sweep is not None and launcher is not None:
        asked = SweepConfig(sweep=sweep, launcher=launcher, job=job or SlurmJob())
    else:
        raise ConfigError(Problem("", "give a config, or sweep= and launcher="))
    if config is not None and (sweep or job or launcher):
        raise ConfigError(Problem("", "give a config, or sweep=, job= and launcher=, not both"))
    run_id = run_id or f"{asked.job.name}-{secrets.token_hex(4)}"
    folder = Path(output_dir) if output_dir else Path(asked.job.output_dir or ".nexa/batches") / run_id
    directory = RunDirectory(folder.expanduser().resolve())
    if directory.script.exists():
        raise ConfigError(Problem("output_dir", f"{directory.path} already holds a job.sbatch: choose another folder"))
    container = container_of(asked, file, None, here=False)
    script = render_script(asked, run_id=run_id, run_dir=str(directory.path), container=container)
    for place in (directory.status, directory.trials, directory.claims):
        place.mkdir(parents=True, exist_ok=True)
    directory.path.chmod(0o700)
    directory.code.symlink_to(code_root(file) if file else Path.cwd(), target_is_directory=True)
    write_script(directory, script)
    array = array_spec(len(asked.trials), asked.job.array_parallelism)
    made = SlurmBatchArtifacts(
        run_id=run_id,
        script_text=script.text,
        array=array,
        trials=len(asked.trials),
        shown=_shown(asked),
        estimate=_estimate(asked, run_id),
        directory=directory.path,
    )
    if not submit:
        return made
    if shutil.which("sbatch") is None:
        raise SubmitError(
            f"sbatch is not on this machine: run `{made.command}` on the cluster's login node, "
            "or launch_slurm_sweep(…, submit=True) to run the trials here"
        )
    done = LocalHost().run(_sbatch(directory.path, array))
    answer = done.stdout.strip().splitlines()
    if done.returncode or not answer:
        raise SubmitError(f"sbatch refused {directory.script}: {done.stderr.strip() or done.stdout.strip()}")
    return replace(made, submitted=True, job_ids=(answer[-1].split(";")[0],))


def preview_batch(run: Run, estimate: CostEstimate, admission: Admission | None = None) -> SlurmBatchArtifacts:
    """Show what a run would submit, and what the scheduler says to it; nothing is written."""
    said = admission or Admission()
    script = script_of(run, gpu=said.gpu, walltime=said.walltime)
    return SlurmBatchArtifacts(
        run_id=run.id,
        script_text=script.text,
        array=array_spec(run.trials, run.config.job.array_parallelism),
        trials=run.trials,
        shown=_shown(run.config),
        estimate=estimate,
        notes=said.notes,
        starts=said.starts,
        placement=placement_of(run),
    )


def submitted_batch(
    run: Run, estimate: CostEstimate, submission: Submission, report: CostReport
) -> SlurmBatchArtifacts:
    """Say what a run that has ended submitted, and how it ended."""
    return SlurmBatchArtifacts(
        run_id=run.id,
        script_text=run.files.script.read_text(encoding="utf-8"),
        array=submission.array,
        trials=run.trials,
        shown=_shown(run.config),
        estimate=estimate,
        directory=run.files.path,
        submitted=True,
        job_ids=(submission.job_id,) if submission.job_id else (),
        report=report,
    )


def _sbatch(directory: Path, array: str) -> list[str]:
    log = log_option(RunDirectory(directory).log)
    return ["sbatch", "--parsable", f"--array={array}", f"--output={log}", "--open-mode=append",
            str(RunDirectory(directory).script), "0", "1"]  # fmt: skip


def _shown(config: SweepConfig | TrainingConfig) -> tuple[tuple[int, str], ...]:
    sweep = config.trials
    count = len(sweep)
    indices = dict.fromkeys([*range(min(SHOWN, count)), *range(max(0, count - SHOWN), count)])
    return tuple((i, join(config.launcher.argv(sweep.base_args, sweep.parameters_of(i)))) for i in indices)


def _estimate(config: SweepConfig | TrainingConfig, run_id: str) -> CostEstimate | None:
    job = config.job
    limit = job.walltime
    try:
        return estimate_batch_cost(
            nodes=job.nodes,
            gpus_per_node=job.gpus,
            duration_hours=limit.total_seconds() / 3600 if limit else None,
            gpu_type=job.gpu,
            job_count=len(config.trials),
            gpu_hour_cost=job.cost_per_gpu_hour,
            run_id=run_id,
            cores_per_node=job.cores,
        )
    except PriceError:
        return None


def preview_markdown(batch: SlurmBatchArtifacts) -> str:
    """Show a preview as Markdown: the trials at both ends, the cost, the script."""
    lines = [f"# {counted(batch.trials, 'trial')}, not submitted", "", f"Array `{batch.array}`", ""]
    if batch.placement:
        lines += [f"**A trial** runs by {batch.placement}", ""]
    if batch.estimate is not None:
        ceiling = batch.estimate.ceiling_usd
        price = batch.estimate.price
        most = "no ceiling" if ceiling is None else f"at most {money(ceiling)}"
        said = f"${price.usd_per_hour} a {price.unit} ({price.item}, {price.provider}, {price.date})"
        lines += [f"**Projected cost**: {most}, at {said}", ""]
    if batch.starts is not None:
        lines += [f"**The scheduler** would start the first trial at {batch.starts}, by the cluster's clock", ""]
    for note in batch.notes:
        lines += [f"**Note**: {note}", ""]
    fence = "`" * (3 + max((len(run) for run in re.findall("`+", batch.script_text)), default=0))
    lines += ["## Trials", "", f"{fence}text", *(f"{index}: {command}" for index, command in batch.shown), fence, ""]
    lines += ["## Script", "", f"{fence}bash", batch.script_text.rstrip(), fence, ""]
    return "\n".join(lines)
