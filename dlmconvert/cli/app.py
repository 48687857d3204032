"""The command line: `dlmconvert VERB ...`. Nothing heavy is imported until a verb runs."""

from __future__ import annotations

import os
import signal
import sys
import warnings

import typer

from dlmconvert import __version__
from dlmconvert.cli.doctor import doctor
from dlmconvert.cli.evaluate import evaluate
from dlmconvert.cli.generate import infill, sample
from dlmconvert.cli.plan import plan
from dlmconvert.cli.recipes import recipes
from dlmconvert.cli.stages import adapt, export, report, run, sft, status

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Convert autoregressive language-model checkpoints into diffusion language models.",
    epilog="Start with: dlmconvert run tiny",
)


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"dlmconvert {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    if debug:
        os.environ["DLMCONVERT_DEBUG"] = "1"


for verb in (run, adapt, sft, export, plan, sample, infill):
    app.command()(verb)
app.command("eval")(evaluate)
for verb in (status, report, doctor):
    app.command()(verb)
app.add_typer(recipes, name="recipes")


def main() -> None:
    """Run the command line; errors become one message and an exit code."""
    # Waiting threads that spin make a busy machine ten times slower; must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # What our libraries will change in their next versions is no news for a user of this one.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(guarded(lambda: app(standalone_mode=False)))


def _terminated(number: int, frame: object) -> None:
    # Until a stage has its own handler (and in commands without stages): leave as Ctrl-C does.
    from dlmconvert.errors import Interrupted

    raise Interrupted("SIGTERM")


def guarded(call) -> int:
    """Call a command; return the exit code of what happened, having told the user."""
    import errno

    from dlmconvert.cli.console import console, show_error
    from dlmconvert.errors import EXIT_FAILED, EXIT_SAVED_RUN_AGAIN, EXIT_WRONG_INPUT, Interrupted, SavedAndLeft, UserError

    try:
        code = call()
        return code if isinstance(code, int) else 0
    except UserError as error:
        if os.environ.get("DLMCONVERT_DEBUG"):
            console.print_exception()
        show_error(error.what, error.why, error.next_step)
        return error.exit_code
    except SavedAndLeft as left:
        show_error(f"{left.signal_name}: saved at step {left.step} and left", "", "the same command continues there")
        return EXIT_SAVED_RUN_AGAIN
    except (Interrupted, KeyboardInterrupt, typer.Abort):
        show_error("interrupted", "finished stages and checkpoints stand", "the same command continues")
        return EXIT_SAVED_RUN_AGAIN
    except typer.Exit as error:
        return error.exit_code
    except BrokenPipeError:
        return 0
    except MemoryError:
        show_error("out of memory", "", "lower micro_batch or data.row_length, or set gradient_checkpointing=true")
        return EXIT_FAILED
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own, of which typer may carry a copy
            if type(error).__name__ != "NoArgsIsHelpError":  # that one has printed the help
                show_error(error.format_message(), "", "add --help to see how the command is used")
            return EXIT_WRONG_INPUT
        if os.environ.get("DLMCONVERT_DEBUG"):
            console.print_exception()
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            show_error(f"the disk is full: {error}", "finished stages and checkpoints stand", "free some space and run the same command again")
        elif "out of memory" in str(error).lower():
            show_error("out of memory", str(error).splitlines()[0], "lower micro_batch or data.row_length, or set gradient_checkpointing=true")
        else:
            show_error(f"{type(error).__name__}: {error}", "this is a bug, or a machine that did something unexpected", "run it again with --debug (dlmconvert --debug ...) and report the traceback")
        return EXIT_FAILED
