"""The two decoders, Python's and the rendered bash's, give every trial the same command."""

from __future__ import annotations

import json
import random
import string
import subprocess
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexa_infra.runs.record import Price, Run, write_run
from nexa_infra.scheduling.local import LocalScheduler
from nexa_infra.scheduling.script import Script, render_script, write_script
from nexa_infra.scheduling.submit import submit_run
from nexa_infra.spec.fields import Value
from nexa_infra.spec.launcher import Launcher
from nexa_infra.spec.run import SweepConfig
from nexa_infra.spec.sweep import SweepDefinition

NASTY = [
    "",
    "-",
    "--help",
    "-n",
    "a b",
    " ",
    "'",
    '"',
    "it's",
    "\\",
    "\\n",
    "line\nbreak",
    "\n",
    "tab\t",
    "\r\n",
    "$(touch /tmp/nexa-pwned)",
    "`id`",
    "${HOME}",
    "$HOME",
    "%s%n%d",
    "*",
    "?",
    "[a-z]",
    "~",
    "!!",
    "#",
    ";",
    "&&",
    "|",
    "<>",
    "{a,b}",
    "{x}",
    "{{x}}",
    "\x01\x7f",
    "é",
    "日本語",
    "🙂",
    "\u2028",
    "\u202e",
    "a=b",
    "x" * 10_000,
]
NAMES = ["lr", "batch_size", "model.width", "weight-decay", "x"]

texts = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
)
values: st.SearchStrategy[Value] = st.one_of(texts, st.booleans(), st.none())
styles = st.sampled_from(["--name value", "--name=value", "name=value"])


@st.composite
def configs(draw: st.DrawFn) -> SweepConfig:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    kind = draw(st.sampled_from(["grid", "zip", "both", "trials", "exclude", "held"]))
    several = st.lists(values, min_size=1, max_size=4)
    sweep: dict[str, Any] = {"base_args": draw(st.lists(texts.map(_escaped), max_size=3))}
    if kind == "trials":
        sweep["trials"] = draw(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(names, values)), min_size=1))
    elif kind in {"zip", "both"}:
        length = draw(st.integers(1, 4))
        zipped = names if kind == "zip" else names[:1]
        sweep["zip"] = {name: draw(st.lists(values, min_size=length, max_size=length)) for name in zipped}
        sweep["parameters"] = {name: draw(several) for name in names if name not in zipped}
    else:
        sweep["parameters"] = {name: draw(several) for name in names}
        if kind == "held":
            sweep["parameters"]["free"] = draw(several)  # a sweep in which nothing varies is refused
            sweep["overrides"] = {names[0]: draw(values), "extra": draw(values)}
        if kind == "exclude":
            first = names[0]
            sweep["parameters"][first] = [*dict.fromkeys(sweep["parameters"][first]), "kept"]
            sweep["exclude"] = [{first: sweep["parameters"][first][0]}]
    command = ["prog", *draw(st.lists(texts.map(_escaped), max_size=2))]
    if kind in {"grid", "both"} and draw(st.booleans()):
        placed = [name for name, given in (sweep.get("parameters") or {}).items() if None not in given]
        command.extend(f"--at={{{name}}}:{{{{{name}}}}}" for name in placed[:1])
    return SweepConfig(
        sweep=SweepDefinition.model_validate(sweep),
        launcher=Launcher(type="command", command=tuple(command), argument_style=draw(styles)),
    )


def _escaped(text: str) -> str:
    return text.replace("{", "(")  # a placeholder's own test is below


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs(), inline=st.booleans())
def test_bash_decodes_every_trial_as_python_does(
    config: SweepConfig, inline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nexa_infra.scheduling.script.MOST_POINTS_INLINE", 256 if inline else 0)
    script = render_script(config, run_id="r", run_dir=str(tmp_path))
    sweep = config.sweep
    expected = [config.launcher.argv(sweep.base_args, sweep.parameters_of(trial)) for trial in range(len(sweep))]
    assert decoded_by_bash(script, tmp_path, len(expected)) == expected


def decoded_by_bash(script: Script, folder: Path, count: int) -> list[list[str]]:
    """Let real bash run the rendered functions, and print every trial's argv."""
    for name, lines in script.tables.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(f"{line}\n" for line in lines()), newline="")
    functions = script.text[: script.text.index("\nnexa_caught=''")]
    loop = '\nfor ((i = 0; i < $1; i++)); do decode $i; printf \'%s\\0\' "${#nexa_argv[@]}" "${nexa_argv[@]}"; done\n'
    path = folder / "decode.sh"
    path.write_text(functions + loop, newline="")
    done = subprocess.run(["bash", path, str(count)], capture_output=True, check=True)
    words = iter(done.stdout.decode().split("\0")[:-1])
    return [[next(words) for _ in range(int(next(words)))] for _ in range(count)]


def test_a_thousand_hostile_trials_reach_the_program_byte_for_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the real script, under the real supervisor, in a folder with a hostile name."""
    random.seed(20261124)
    alphabet = string.printable + "é日🙂\u2028"

    def word() -> str:
        if random.random() < 0.5:
            return random.choice(NASTY)
        return "".join(random.choice(alphabet) for _ in range(random.randrange(30)))

    points = [{"first": word(), "second": word()} for _ in range(1000)]
    environment = {f"HOSTILE_{n}": text for n, text in enumerate(NASTY)}
    environment |= {"argv": "kept", "status": "kept", "code": "kept"}  # names that a script may use itself
    dump = tmp_path / "dump.py"
    dump.write_text(
        "import json, os, sys\n"
        "open(os.environ['NEXA_METRICS'], 'w').write(json.dumps({'argv': sys.argv[1:], 'env': dict(os.environ)}))\n"
    )
    config = SweepConfig.model_validate(
        {
            "job": {"name": "hostile", "array_parallelism": 2, "env": environment},
            "launcher": {
                "type": "command",
                "command": ["python3", "-S", "-I", str(dump)],
                "argument_style": "name=value",
            },
            "sweep": {"trials": points, "base_args": [_escaped(text) for text in NASTY[:10]]},
        }
    )
    run = made_run(config, tmp_path / "a 'hostile' $(dir)\nname")
    follow_to_end(run)

    different = 0
    for trial, point in enumerate(points):
        seen = json.loads(run.files.metrics(trial).read_text())
        expected = config.launcher.argv(config.sweep.base_args, dict(point))[4:]
        wrong = seen["argv"] != expected or any(seen["env"].get(name) != text for name, text in environment.items())
        different += wrong
    with capsys.disabled():
        print(f"\ncompared {len(points)} different {different}")
    assert different == 0
    assert not Path("/tmp/nexa-pwned").exists()


def made_run(config: SweepConfig, folder: Path) -> Run:
    """Lay out a run directory by hand, so that the engine's lower half is tested alone."""
    folder.mkdir(parents=True)
    run = Run(
        id="run",
        config=config,
        directory=str(folder),
        workdir=str(folder.parent),
        price=Price(
            item="cpu", unit="core-hour", usd_per_hour=Decimal(1), provider="test", source="test", date="2026-11-24"
        ),
        created_at=datetime.now(UTC),
    )
    for place in (run.files.submissions, run.files.claims, run.files.status, run.files.trials):
        place.mkdir()
    write_script(run.files, render_script(config, run_id=run.id, run_dir=run.directory))
    run.files.code.symlink_to(folder)
    write_run(run)
    return run


def follow_to_end(run: Run) -> None:
    """Submit a run and wait for its end, as the engine does."""
    import asyncio

    from nexa_infra.scheduling.watch import follow

    scheduler = LocalScheduler()
    submit_run(run, scheduler)

    async def watch() -> None:
        async for _ in follow(run, scheduler, period=0.1):
            pass

    asyncio.run(watch())
