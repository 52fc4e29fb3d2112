"""The `modelmill` command: one line for a mistake, exit code 2, and never a traceback on the screen.

Exit codes: 0 everything succeeded, 1 something failed, 2 the user can mend it, 130 and 143 the run was cancelled.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback

import click

from modelmill.components.core.errors import UserError
from modelmill.pipelines.commands import (
    cancelling,
    compiling,
    fetching,
    launching,
    listing,
    planning,
    pruning,
    reading,
    registry,
    scheduling,
    serving,
)

_EPILOG = """\b
Examples:
  modelmill list
  modelmill plan laptop/llama-demo
  modelmill run laptop/llama-demo --set training.steps=200
  modelmill logs latest pretrain
"""


class _Commands(click.Group):
    """Subcommands in the order of use; a mistyped one gets a suggestion."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            from modelmill.components.core.recipe import suggest  # 0.1 s that --help need not pay

            raise click.UsageError(f"no command is called {args[0]!r}; {suggest(args[0], list(self.commands))}")
        return super().resolve_command(context, args)


@click.group(cls=_Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="modelmill", prog_name="modelmill")
def cli() -> None:
    """Train, tune and judge models in Kubeflow pipelines, here and on a cluster, tracked in MLflow."""


for command in (
    listing.list_command,
    planning.plan_command,
    launching.run_command,
    reading.runs_command,
    reading.logs_command,
    launching.resume_command,
    cancelling.cancel_command,
    fetching.report_command,
    fetching.fetch_command,
    scheduling.schedule_command,
    scheduling.schedules_command,
    serving.ui_command,
    pruning.prune_command,
    registry.models_command,
    registry.rollback_command,
    compiling.compile_command,
    serving.doctor_command,
):
    cli.add_command(command)


def main() -> None:
    """Entry point: run the command and turn whatever happens into one line and an exit code."""
    # pydantic looks for plugins in the entry points of every installed distribution: 15 ms for nothing.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    try:
        code = _invoke(sys.argv[1:] or ["--help"])
    except UserError as error:
        code = _complain(str(error), 2)
    except click.ClickException as error:
        code = _complain(error.format_message(), 2)
    except (KeyboardInterrupt, click.Abort):
        code = _complain("interrupted", 130)
    except BrokenPipeError:  # the reader has gone, as in `modelmill logs latest | head`
        code = 0
    except Exception as error:
        code = _crash(error)
    _flush()
    sys.exit(code)


def _invoke(arguments: list[str]) -> int:
    """Run the command line; not `cli.main`, which ends with 1 and says nothing when the reader has gone."""
    try:
        with cli.make_context("modelmill", arguments) as context:
            cli.invoke(context)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    return 0


def _complain(message: str, code: int) -> int:
    print(f"modelmill: {' '.join(message.split())}", file=sys.stderr)
    return code


def _crash(error: Exception) -> int:
    """A defect of ours: the traceback goes to a file that can be sent along."""
    with tempfile.NamedTemporaryFile("w", prefix="modelmill-", suffix=".log", delete=False) as file:
        traceback.print_exception(error, file=file)
    return _complain(f"{type(error).__name__}: {error} (this is a defect; traceback in {file.name})", 1)


def _flush() -> None:
    """Push out what is buffered; a reader that has gone must not add a message at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
