"""Run a config through its Prefect flow, and show progress, report and places on the terminal."""

from __future__ import annotations

import asyncio
import os
import sys

from nexa_infra.errors import NexaError
from nexa_infra.spec.load import load_config


async def _take(config_file: str) -> tuple[str | None, BaseException | None]:
    """Run the flow; return the flow run's id, and what it ended with if it did not succeed."""
    from nexa_infra.flows import sweep, training

    flow = training if load_config(config_file).kind == "training" else sweep
    state = await flow(config_file=config_file, submit=True, return_state=True)
    found = await state.aresult(raise_on_failure=False)
    flow_run_id = state.state_details.flow_run_id
    return str(flow_run_id) if flow_run_id else None, found if isinstance(found, BaseException) else None


def _show(flow_run_id: str | None) -> None:
    """Print the run's report, and where to look further."""
    from prefect.settings import PREFECT_UI_URL

    from nexa_infra.flows.road import run_token
    from nexa_infra.monitoring.report import read_report, to_terminal
    from nexa_infra.operations.manage import find_by_token

    token = run_token(flow_run_id)
    run = find_by_token(token) if token else None
    if run is not None and run.files.report_json.exists():
        print(to_terminal(read_report(run.files.report_json.read_text(encoding="utf-8"))))
        print(f"Run directory: {run.directory}")
    print(f"Flow run: {PREFECT_UI_URL.value()}/runs/flow-run/{flow_run_id}")


def main() -> int:
    """Run the config that the first argument names; return the exit code."""
    # Before Prefect is imported: its records of the run keep every line, the terminal shows progress and report.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    from nexa_infra.operations.progress import listener, terminal_line

    config_file = sys.argv[1]
    try:
        load_config(config_file)  # what cannot be read starts no flow run
        with terminal_line() as tell:
            listener.set(tell)
            flow_run_id, error = asyncio.run(_take(config_file))
    except KeyboardInterrupt:
        print("stopped: `.venv/bin/python -m nexa_infra resume latest` runs what is unfinished", file=sys.stderr)
        return 130
    except NexaError as raised:
        print(raised, file=sys.stderr)
        return raised.exit_code
    _show(flow_run_id)
    if error is not None:
        print(error, file=sys.stderr)
        return error.exit_code if isinstance(error, NexaError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
