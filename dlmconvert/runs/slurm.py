"""A job script for SLURM that survives pre-emption: saved in time, requeued, continued where it stopped."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dlmconvert import __version__
from dlmconvert.errors import EXIT_FAILED, EXIT_SAVED_RUN_AGAIN, UserError

SAVE_SECONDS = 120  # the scheduler's signal comes so long before the end
_SHORT = {"-J": "job-name", "-N": "nodes", "-o": "output", "-D": "chdir", "-G": "gpus"}
_GPU_OPTIONS = {"gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "gres"}

_SCRIPT = """\
#!/bin/bash
# {title}
{directives}

# USR1 comes {seconds} s before the time limit (and before a pre-emption, where the site sends it); TERM at a pre-emption.
# The ranks finish their step, save, and leave with exit code {again}: then the job goes back into the queue.
signalled=1
pass_on() {{ signalled=1; kill -s "$1" "$step" 2>/dev/null; }}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

{exports}echo "job $SLURM_JOB_ID, start $((${{SLURM_RESTART_COUNT:-0}} + 1)), on $SLURM_JOB_NODELIST"
# One rank that ends takes the others with it by itself; srun must not kill those that still save.
srun --kill-on-bad-exit=0 --wait=300 {command} &
step=$!
while [ "$signalled" = 1 ]; do signalled=0; wait "$step"; code=$?; done

if [ "$code" = {again} ]; then
    case "$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null)" in
        *JobState=CANCELLED*) echo "cancelled: saved, not requeued" ;;
        *) scontrol requeue "$SLURM_JOB_ID" ;;
    esac
fi
exit "$code"
"""


def job_script(*, title: str, name: str, words: Sequence[str], log: Path, nodes: int, processes_per_node: int, gpus: bool, options: Sequence[str] = ()) -> str:
    """The text of an sbatch script. words: of the dlmconvert command that every task runs, in the current folder.

    gpus: ask for one GPU a process. options: sbatch's own, from behind `--`; they win over ours. Raises UserError for what is no option.
    """
    ours = {
        "job-name": re.sub(r"[^\w.-]", "-", name),
        "nodes": nodes,
        "ntasks-per-node": processes_per_node,
        "gpus-per-node": processes_per_node,
        "chdir": os.getcwd(),
        "output": log,
        "open-mode": "append",
        "signal": f"B:USR1@{SAVE_SECONDS}",
    }
    theirs = grouped(options)
    given = {_SHORT.get(group[0][:2], "") if not group[0].startswith("--") else group[0][2:].partition("=")[0] for group in theirs}
    if not gpus or given & _GPU_OPTIONS:
        del ours["gpus-per-node"]
    lines = [f"#SBATCH --{option}={_quoted(str(value))}" for option, value in ours.items() if option not in given]
    lines += ["#SBATCH --requeue"]
    lines += ["#SBATCH " + " ".join(_quoted(word) for word in group) for group in theirs]
    exports = ""
    if os.environ.get("PYTHONPATH"):
        exports = f"export PYTHONPATH={shlex.quote(os.environ['PYTHONPATH'])}\n"
    command = shlex.join([sys.executable, "-m", "dlmconvert", *words])
    return _SCRIPT.format(
        title=f"dlmconvert {__version__}: {' '.join(title.split())}", directives="\n".join(lines), seconds=SAVE_SECONDS, again=EXIT_SAVED_RUN_AGAIN, exports=exports, command=command
    )


def grouped(options: Sequence[str]) -> list[list[str]]:
    """`--partition gpu --time=1:00` -> an option and its value belong together. Raises UserError for a value without an option."""
    groups: list[list[str]] = []
    for word in options:
        if "\n" in word or "\r" in word:
            raise UserError(f"{word!r} has a line break in it", "every option becomes one #SBATCH line")
        if word.startswith("-"):
            groups.append([word])
        elif not groups:
            raise UserError(f"{word!r} is not an option of sbatch", "arguments after -- become #SBATCH lines", "as in -- --partition=gpu --time=24:00:00")
        else:
            groups[-1].append(word)
    return groups


def _quoted(word: str) -> str:
    """For an #SBATCH line, which knows quotes but no shell."""
    return f'"{word}"' if re.search(r"[\s#']", word) else word


def write_script(path: Path, text: str) -> Path | None:
    """Write the script; an older one that differs (somebody may have edited it) stays beside it. Returns where that is, or None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = None
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        number = 1
        while (kept := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
            number += 1
        path.rename(kept)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return kept


def submit(path: Path) -> str:
    """Hand the script to sbatch; returns its answer. Raises UserError when it is not there or refuses."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise UserError("sbatch is not on this machine", f"the script is written: {path}", f"submit it where SLURM is: sbatch {shlex.quote(str(path))}", exit_code=EXIT_FAILED)
    done = subprocess.run([sbatch, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch refused {path}", done.stderr.strip(), "options for it stand behind --, as in -- --partition=gpu --time=24:00:00", exit_code=EXIT_FAILED)
    return done.stdout.strip()
