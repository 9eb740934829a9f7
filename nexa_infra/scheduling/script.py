"""The job array script: one text for the whole sweep, however many trials it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING

from nexa_infra.containers.pyxis import Pyxis, pyxis_of
from nexa_infra.containers.script import CONTAINER_CONF, CONTAINER_SCRIPT, GUARD, container_conf, shell_text
from nexa_infra.hosts.shell import join, quote, quote_line, quote_path
from nexa_infra.runs.directory import RunDirectory, write_atomically
from nexa_infra.scheduling.arguments import array_spec
from nexa_infra.scheduling.torchrun import GANG_SCRIPT, Gang, chooses_place, gang_of, gang_script
from nexa_infra.scheduling.trackers import config_entries, tracking_lines
from nexa_infra.spec.container import size_bytes
from nexa_infra.spec.launcher import Launcher, argument, pieces, placeholders, written
from nexa_infra.spec.policy import Checkpoint
from nexa_infra.spec.sweep import Point

if TYPE_CHECKING:
    import jinja2

    from nexa_infra.runs.record import Container, Run
    from nexa_infra.spec.cluster import Cluster
    from nexa_infra.spec.job import Setup, SlurmJob
    from nexa_infra.spec.run import SweepConfig, TrainingConfig

# A longer axis goes to a file of its own: bash reads the whole script for every trial.
MOST_POINTS_INLINE = 256
SURVIVORS = "tables/survivors"


@dataclass(frozen=True)
class Script:
    """A rendered script, and the tables that stand beside it in the run directory.

    `tables` maps a path in the run directory to its lines, made as they are asked for.
    """

    text: str
    tables: dict[str, Callable[[], Iterator[str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Axis:
    """An axis, as the template shows it."""

    title: str
    size: int
    points: tuple[str, ...] = ()
    table: str | None = None


def render_script(
    config: SweepConfig | TrainingConfig,
    *,
    run_id: str,
    run_dir: str,
    cluster: Cluster | None = None,
    gpu: str | None = None,
    walltime: str | None = None,
    container: Container | None = None,
    images: str = "~/.cache/nexa-infra/images",
) -> Script:
    """Render a run's array script; `run_dir` is the run directory's absolute path on its host.

    The cluster's partition and account stand in where the job names none; `gpu` is the site's own name
    for the type of the GPUs that the job counts, `walltime` its limit, where the job asks for more.
    Trials run in `container`, whose SIF, where it needs one, is kept in the folder `images` of that host.
    """
    sweep, launcher = config.trials, config.launcher
    job = config.job if walltime is None else config.job.model_copy(update={"time": walltime})
    template = launcher.template(sweep.base_args)
    placed = sorted(placeholders(template))
    told = config.tracking is not None and config.tracking.wandb is not None
    encode = _Encoder(launcher, {name: number for number, name in enumerate(placed)}, told=told)
    axes = []
    tables: dict[str, Callable[[], Iterator[str]]] = {}
    for number, axis in enumerate(sweep.axes):
        names = ", ".join(dict.fromkeys(name for point in axis for name, _ in point)) or "no parameter"
        if len(axis) > MOST_POINTS_INLINE:
            table = f"tables/axis-{number}"
            tables[table] = lambda axis=axis: (encode.point(point) for point in axis)  # type: ignore[misc]
            axes.append(_Axis(names, len(axis), table=table))
        else:
            axes.append(_Axis(names, len(axis), tuple(encode.point(point) for point in axis)))
    if sweep.survivors is not None:
        survivors = sweep.survivors
        tables[SURVIVORS] = lambda: (str(index) for index in survivors)
    gang = gang_of(launcher, job)
    if gang is not None:
        tables[GANG_SCRIPT] = lambda: iter(gang_script().splitlines())
    variables = {**job.env, **sweep.env}
    share = Share.of(job)
    boxed = container is not None and container.runtime != "pyxis"
    pyxis: Pyxis | None = None
    if container is not None and boxed:
        network = "host" if gang is not None and gang.nodes > 1 else None
        lines = partial(
            container_conf,
            container,
            run_id=run_id,
            cache=images,
            gpus=share.gpus,
            memory=share.memory,
            network=network,
        )
        tables |= {name: partial(_shell_lines, name) for name in (CONTAINER_SCRIPT, GUARD)} | {CONTAINER_CONF: lines}
    elif container is not None:
        inside = variables | container.settings.env
        own = [("nexa_code_dir", "ro"), ("nexa_run_dir", "rw")]
        own += [("nexa_checkpoints", "rw")] if config.checkpoint.dir is not None else []
        pyxis = pyxis_of(container, inside, own=own)
        variables = inside
    count = len(sweep)
    text = _template().render(
        options=(*sbatch_options(job, cluster, gpu), *_interruption(config, gang)),
        title=f"{job.name}: {count:,} {'trials' if count > 1 else 'trial'}, run {run_id}",
        array=array_spec(count, job.array_parallelism),
        run_id=run_id,
        run_dir=run_dir,
        trials=count,
        axes=axes,
        survivors=SURVIVORS if sweep.survivors is not None else None,
        placed=placed,
        held=[encode.point(((name, value),)) for name, value in sweep.overrides.items()],
        template=" ".join(encode.word(word) for word in template),
        env=tuple(variables.items()),
        env_file=job.env_file,
        tracking=tuple(tracking_lines(config, run_id)),
        told=told,
        setup=tuple(setup_lines(job.setup)),
        threads=share.cores if "cpus_per_task" in job.model_fields_set and gang is None else None,
        boxed=boxed,
        inside_names=" ".join(variables),
        pyxis=pyxis,
        gang=gang,
        meets=gang is not None and gang.nodes > 1 and not chooses_place(launcher),
        checkpoints=_checkpoints(config.checkpoint, run_id),
        # A trial of a large sweep that keeps none gets no folder for them.
        checkpointed=gang is not None or config.kind == "training" or config.checkpoint != Checkpoint() or job.warns,
        packs=job.packs,
        at_once=job.trials_at_once,
        share=share.options,
        cores=share.cores,
        limit=int(job.walltime.total_seconds()) if job.walltime is not None else None,
        signals=list(dict.fromkeys(("TERM", "USR1", "USR2", job.warning_signal))),
        warned=warns(config),
        warning_signal=job.warning_signal,
        log=_log_sizes(job.log_bytes),
        resumes=config.checkpoint.resumes,
        most=config.checkpoint.most_requeues,
        chain=config.checkpoint.chain_until_done,
        warning=job.warning_seconds,
    )
    return Script(text, tables)


def _shell_lines(name: str) -> Iterator[str]:
    return iter(shell_text(name).splitlines())


def script_of(run: Run, *, gpu: str | None = None, walltime: str | None = None) -> Script:
    """Render a run's script, for where it runs; see `render_script`."""
    return render_script(
        run.config,
        run_id=run.id,
        run_dir=run.directory,
        cluster=run.cluster,
        gpu=gpu,
        walltime=walltime,
        container=run.container,
        images=f"{run.workdir}/images",
    )


def sbatch_options(job: SlurmJob, cluster: Cluster | None = None, gpu: str | None = None) -> Iterator[str]:
    """Yield the `#SBATCH` options of a job; those that hold a path go to sbatch as arguments instead."""
    values: list[tuple[str, object]] = [
        ("job-name", job.name),
        ("partition", job.partition or (cluster.partition if cluster else None)),
        ("account", job.account or (cluster.account if cluster else None)),
        ("qos", job.qos),
        ("time", job.time),
        ("nodes", job.nodes),
        ("ntasks-per-node", job.ntasks_per_node),
        ("cpus-per-task", job.cpus_per_task),
        ("gpus-per-node", _gpus(job, gpu)),
        ("mem", job.memory),
        ("constraint", job.constraint),
        ("gres", job.gres),
        ("nodelist", job.nodelist),
        ("exclude", job.exclude),
        ("reservation", job.reservation),
        ("dependency", job.dependency),
        ("mail-type", job.mail_type),
        ("mail-user", job.mail_user),
        *job.extra.items(),
    ]
    for name, value in values:
        if value is True:
            yield f"--{name}"
        elif value is not None and value is not False:
            yield f"--{name}={_sbatch_quote(str(value))}"


@dataclass(frozen=True)
class Share:
    """What each of the trials that run side by side in one array task has of it."""

    cores: int
    gpus: int
    memory: str | None  # as job.memory is written
    options: tuple[str, ...]  # srun's

    @classmethod
    def of(cls, job: SlurmJob) -> Share:
        """Return it; a trial that runs alone has all."""
        many = job.trials_at_once
        cores, gpus, memory = job.cpus_per_task // many, job.gpus // many, job.memory
        if memory is not None and many > 1 and (size := size_bytes(memory)):
            memory = f"{size // many // 1024}K"
        options = [f"--cpus-per-task={cores}"]
        if gpus:
            options.append(f"--gpus-per-node={gpus}" if job.gpus_per_node else f"--gres=gpu:{gpus}")
        return cls(cores, gpus, memory, tuple(options))


@dataclass(frozen=True)
class LogSizes:
    """How much of a log is kept: its beginning, and two pieces of its end; and how much is read at once, in bytes."""

    half: int
    quarter: int
    block: int


def _log_sizes(limit: int | None) -> LogSizes | None:
    return LogSizes(limit // 2, limit // 4, min(64 * 1024, limit // 64)) if limit is not None else None


def warns(config: SweepConfig | TrainingConfig) -> bool:
    """Say whether trials are warned before their walltime."""
    return config.checkpoint.resumes or config.job.warns


def _interruption(config: SweepConfig | TrainingConfig, gang: Gang | None) -> Iterator[str]:
    """Yield the options by which a job is warned and may go back into the queue, or outlives a node."""
    if config.checkpoint.resumes:
        yield "--requeue"
    if warns(config):
        yield f"--signal=B:{config.job.warning_signal}@{config.job.warning_seconds}"
    if gang is not None and gang.elastic:
        yield "--no-kill"


def _checkpoints(checkpoint: Checkpoint, run_id: str) -> str:
    """Return bash for the folder of a trial's checkpoints."""
    if checkpoint.dir is None:
        return "$nexa_trial_dir/checkpoints"
    return f"{quote_path(checkpoint.dir.rstrip('/'))}/{quote(run_id)}/$nexa_trial"


def setup_lines(setup: Setup) -> Iterator[str]:
    """Yield the lines of bash that make a trial's environment; each stops the trial where it fails."""
    if setup.modules:
        yield "if ! type module >/dev/null 2>&1; then"
        yield "  for nexa_init in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh /usr/share/lmod/lmod/init/bash; do"
        yield '    [[ -r $nexa_init ]] && . "$nexa_init" && break'
        yield "  done"
        yield "fi"
        yield f"module load {join(setup.modules)} || return"
    if setup.conda is not None:
        yield 'eval "$(conda shell.bash hook)" || return'
        yield f"conda activate {quote(setup.conda)} || return"
    if setup.venv is not None:
        yield f". {quote_path(setup.venv.rstrip('/') + '/bin/activate')} || return"
    if setup.uv is not None:
        yield f". {quote_path(setup.uv.rstrip('/') + '/.venv/bin/activate')} || return"
    yield from setup.lines


class _Encoder:
    """Writes parameters as bash that fills `args`, or the variable of a placeholder; with `told` W&B's config, too."""

    def __init__(self, launcher: Launcher, placed: dict[str, int], *, told: bool = False) -> None:
        self._style = launcher.argument_style
        self._placed = placed
        self._told = told

    def point(self, point: Point) -> str:
        """Return one line that sets what a point sets."""
        words: list[str] = []
        lines: list[str] = []
        for name, value in point:
            if name in self._placed:
                lines.append(f"nexa_value_{self._placed[name]}={quote_line(written(value))}")
            else:
                words.extend(argument(name, value, self._style))
        if words:
            lines.append(f"nexa_args+=({' '.join(quote_line(word) for word in words)})")
        if self._told and (entries := config_entries(point)):
            lines.append(entries)
        return " ".join(lines) or ":"

    def word(self, word: str) -> str:
        """Return a word of the template, its placeholders as variables."""
        parts = [f'"$nexa_value_{self._placed[text]}"' if name else quote_line(text) for text, name in pieces(word)]
        return "".join(parts) or "''"


def _gpus(job: SlurmJob, gpu: str | None) -> str | None:
    """Return `--gpus-per-node`, its type by the site's own name for it."""
    if not job.gpus_per_node:
        return None
    return f"{gpu}:{job.gpus_per_node}" if gpu else str(job.gpus_per_node)


def _sbatch_quote(value: str) -> str:
    """Quote a value of an `#SBATCH` line, which sbatch splits at spaces and cuts at `#`."""
    if not value or any(character in " \t#'\"\\" for character in value):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return value


@cache
def environment() -> jinja2.Environment:
    """Return what renders shell scripts: every value goes through a quoting filter."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("nexa_infra.scheduling"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="<#",  # ${#array[@]} is bash's
        comment_end_string="#>",
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 - a shell script; quoting is the filters' work
        optimized=False,  # it is rendered once a process: what is saved in compiling is more
    )
    made.filters["quote"] = quote
    made.filters["quote_line"] = quote_line
    made.filters["quote_path"] = quote_path
    return made


@cache
def _template() -> jinja2.Template:
    return environment().get_template("job.sbatch.j2")


def write_script(directory: RunDirectory, script: Script) -> None:
    """Write a script and its tables into a run directory."""
    write_atomically(directory.script, script.text, mode=0o700)
    for name, lines in script.tables.items():
        path = directory.path / name
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, "".join(f"{line}\n" for line in lines()))
