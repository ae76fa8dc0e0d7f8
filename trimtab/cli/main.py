"""The console script ``trimtab``: finds the command, keeps standard output clean for JSON, and reports errors.

A command's module imports only typer and the standard library; torch, tvm and the rest are imported when the command
runs, so that ``trimtab --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from trimtab import __version__
from trimtab.cli.bench import bench_command
from trimtab.cli.bisect import bisect_command
from trimtab.cli.compile import compile_command
from trimtab.cli.demo import demo_command
from trimtab.cli.doctor import doctor_command
from trimtab.cli.error_report import report
from trimtab.cli.inspect import inspect_command
from trimtab.cli.optimize import optimize_command
from trimtab.cli.output import keep_stdout_for_json
from trimtab.cli.passes import passes_command
from trimtab.cli.run import run_command

app = typer.Typer(
    name="trimtab",
    help="Compile transformer models: trace, rewrite, generate native code, run without the framework.",
    epilog="Exit codes and examples: docs/cli.md",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: dict[str, Callable[..., None]] = {
    "compile": compile_command,
    "run": run_command,
    "bench": bench_command,
    "inspect": inspect_command,
    "optimize": optimize_command,
    "passes": passes_command,
    "bisect": bisect_command,
    "doctor": doctor_command,
    "demo": demo_command,
}
"""Every command by name, in the order ``trimtab --help`` lists them."""

for _name, _function in COMMANDS.items():
    app.command(_name)(_function)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"trimtab {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (that of the process by default) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    warnings.showwarning = _show_warning
    keep_stdout_for_json(sys.stdout)
    # What libraries and the user's own model file print must not get into the JSON document.
    redirected = contextlib.redirect_stdout(sys.stderr) if "--json" in given else contextlib.nullcontext()
    try:
        # Not app(): that turns Ctrl-C and closed pipes into exit codes of its own.
        with redirected, typer.main.get_command(app).make_context("trimtab", given or ["--help"]) as context:
            context.command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as leaving:
        return leaving.exit_code
    except BaseException as error:  # Ctrl-C too: whatever it is, it is reported here and nowhere else
        return report(error, given)
    return 0


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
