"""The command line: `qtoolkit COMMAND TARGET [options]`. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
import traceback

import typer

from qtoolkit.cli import bench, compress, convert, doctor, eval as evaluation, inspect, listing, output, quantize, serve
from qtoolkit.errors import QToolkitError

BUG, INTERRUPTED, MISUSED = 70, 130, 2
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # base of all wrong usage; typer carries its own click

app = typer.Typer(
    name="qtoolkit",
    help="Quantize language models to W4A8, serve them on vLLM, and measure what was lost.",
    add_completion=False,
    rich_markup_mode=None,  # plain help answers in a tenth of a second
    pretty_exceptions_enable=False,
)
app.command("quantize")(quantize.command)
app.command("compress")(compress.command)
app.command("convert")(convert.command)
app.command("serve")(serve.command)
app.command("eval")(evaluation.command)
app.add_typer(bench.app, name="bench")
app.command("inspect")(inspect.command)
app.command("list")(listing.command)
app.command("doctor")(doctor.command)


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from qtoolkit import __version__

        output.result(__version__)
    elif context.invoked_subcommand is None:
        output.result(context.get_help())


def main() -> None:
    """Run a command; turn every error into one sentence, one hint and the exit code that says whose fault it is."""
    as_json = "--json" in sys.argv[1:]
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # so says typer of Ctrl-C, without a word
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        output.error("Interrupted.", "", INTERRUPTED, as_json=as_json)
        code = INTERRUPTED
    except UsageError as error:
        message = error.format_message()  # type: ignore[attr-defined]
        output.error(message, "`qtoolkit COMMAND --help` shows the options.", MISUSED, as_json=as_json)
        code = MISUSED
    except QToolkitError as error:
        output.error(error.message, error.hint, error.exit_code, as_json=as_json)
        code = error.exit_code
    except BrokenPipeError:  # the reader of stdout went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:  # the border of the program: nothing may reach the user as a bare traceback
        if os.environ.get("QTOOLKIT_TRACEBACK"):
            traceback.print_exc()
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        hint = "Set QTOOLKIT_TRACEBACK=1 to see where, and report it."
        output.error(f"A bug in qtoolkit: {what}", hint, BUG, as_json=as_json)
        code = BUG
    sys.exit(code if isinstance(code, int) else 0)
