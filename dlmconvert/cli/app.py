"""The command line: `dlmconvert VERB ...`. Nothing heavy is imported until a verb runs."""

from __future__ import annotations

import os
import signal
import sys
import warnings

import typer

from dlmconvert import __version__
from dlmconvert.cli.bench import bench
from dlmconvert.cli.chat import chat
from dlmconvert.cli.compare import compare
from dlmconvert.cli.doctor import doctor
from dlmconvert.cli.evaluate import evaluate
from dlmconvert.cli.generate import infill, sample
from dlmconvert.cli.launching import LaunchedCommand
from dlmconvert.cli.methods import methods
from dlmconvert.cli.outcome import outcome_of
from dlmconvert.cli.plan import plan
from dlmconvert.cli.recipes import recipes
from dlmconvert.cli.replay import replay
from dlmconvert.cli.stages import adapt, export, report, run, sft
from dlmconvert.cli.status import status
from dlmconvert.cli.tune import tune_sampler
from dlmconvert.threads import spin_briefly

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
    local_rank: int = typer.Option(0, "--local_rank", "--local-rank", hidden=True, help="What the deepspeed launcher adds; LOCAL_RANK says the same."),
) -> None:
    if debug:
        os.environ["DLMCONVERT_DEBUG"] = "1"


for verb in (run, adapt, sft):
    app.command(cls=LaunchedCommand)(verb)
for verb in (export, compare, plan, sample, infill, chat, bench, tune_sampler):
    app.command()(verb)
app.command("eval")(evaluate)
for verb in (status, report, replay, doctor):
    app.command()(verb)
app.add_typer(recipes, name="recipes")
app.command()(methods)


def main() -> None:
    """Run the command line; errors become one message and an exit code."""
    spin_briefly()
    usable_streams()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # What our libraries will change in their next versions is no news for a user of this one.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    signal.signal(signal.SIGTERM, _terminated)
    sys.exit(guarded(lambda: app(standalone_mode=False)))


def usable_streams() -> None:
    """Standard streams that take any text, and are there: a caller may have closed them, or speak an encoding without the model's words."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _terminated(number: int, frame: object) -> None:
    # Until a stage has its own handler (and in commands without stages): leave as Ctrl-C does.
    from dlmconvert.errors import Interrupted

    raise Interrupted("SIGTERM")


def guarded(call) -> int:
    """Call a command; return the exit code of what happened, having told the user."""
    from dlmconvert.cli.console import show_error

    outcome = outcome_of(call)
    if outcome.what and not outcome.told:
        show_error(outcome.what, outcome.why, outcome.next_step)
    return outcome.code
