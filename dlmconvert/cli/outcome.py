"""What a command came to: an exit code and, when something went wrong, one message."""

from __future__ import annotations

import errno
import os

import typer

from dlmconvert.errors import EXIT_FAILED, EXIT_SAVED_RUN_AGAIN, EXIT_WRONG_INPUT, Interrupted, Outcome, SavedAndLeft, Told, UserError

_LOWER = (
    "training: lower micro_batch or data.row_length, or set gradient_checkpointing=true; decoding: fewer texts at once (--batch), or shorter ones"
)


def outcome_of(call) -> Outcome:
    """Call a command; whatever it raises becomes an outcome. With --debug the traceback is shown as well."""
    try:
        code = call()
        return Outcome(code if isinstance(code, int) else 0)
    except Told as told:
        return told.outcome
    except UserError as error:
        _show_traceback()
        return Outcome(error.exit_code, error.what, error.why, error.next_step)
    except SavedAndLeft as left:
        return Outcome(EXIT_SAVED_RUN_AGAIN, f"{left.signal_name}: saved at step {left.step} and left", "", "the same command continues there")
    except (Interrupted, KeyboardInterrupt, typer.Abort):
        return Outcome(EXIT_SAVED_RUN_AGAIN, "interrupted", "finished stages and checkpoints stand", "the same command continues")
    except typer.Exit as error:
        return Outcome(error.exit_code)
    except BrokenPipeError:
        return Outcome()
    except MemoryError:
        return Outcome(EXIT_FAILED, "out of memory", "", _LOWER)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own, of which typer may carry a copy
            helped = type(error).__name__ == "NoArgsIsHelpError"  # that one has printed the help
            return Outcome(EXIT_WRONG_INPUT, "" if helped else error.format_message(), "", "add --help to see how the command is used")
        _show_traceback()
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return Outcome(EXIT_FAILED, f"the disk is full: {error}", "finished stages and checkpoints stand", "free some space and run the same command again")
        if any(words in str(error).lower() for words in ("out of memory", "allocate memory")):  # of GPUs and of torch's allocator on CPUs
            return Outcome(EXIT_FAILED, "out of memory", str(error).splitlines()[0], _LOWER)
        from dlmconvert.training.ranks import lost_peer

        if lost_peer(error):
            why, again = "the message of that rank says why", "the same command continues from the newest checkpoint"
            return Outcome(EXIT_FAILED, f"another rank has gone: {str(error).splitlines()[0][:200]}", why, again, lost_peer=True)
        why = "this is a bug, or a machine that did something unexpected"
        return Outcome(EXIT_FAILED, f"{type(error).__name__}: {error}", why, "run it again with --debug (dlmconvert --debug ...) and report the traceback")


def _show_traceback() -> None:
    if os.environ.get("DLMCONVERT_DEBUG"):
        from dlmconvert.cli.console import console

        console.print_exception()
