"""How many processes a training command runs in, and on which machines: the options, and what they lead to."""

from __future__ import annotations

import functools
import inspect
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dlmconvert.errors import Outcome, Told, UserError

_BEHIND = "dlmconvert.behind_dashes"
_PANEL = {"rich_help_panel": "Several processes"}


@dataclass(frozen=True)
class Launching:
    """What was asked for. behind: the words behind `--`, which go to the launcher."""

    processes: int | None = None
    nodes: int | None = None
    node_rank: int | None = None
    master: str | None = None
    hostfile: str | None = None
    slurm: bool = False
    submit: bool = False
    dry_run: bool = False
    behind: tuple[str, ...] = ()


ALONE = Launching()

_OPTIONS: dict[str, Any] = {
    "processes": Annotated[int | None, typer.Option("--processes", min=1, metavar="N", help="Train in N processes in all: one a GPU; on the CPU too. More than one means DeepSpeed.", **_PANEL)],
    "nodes": Annotated[int | None, typer.Option("--nodes", min=1, metavar="N", help="Deal them to N machines, evenly.", **_PANEL)],
    "hostfile": Annotated[str | None, typer.Option("--hostfile", metavar="FILE", help="The machines, a line each: NAME slots=8. Run it on the first; it starts the others over ssh.", **_PANEL)],
    "node_rank": Annotated[int | None, typer.Option("--node-rank", min=0, metavar="R", help="Without a hostfile: which machine this is, from 0.", **_PANEL)],
    "master": Annotated[str | None, typer.Option("--master", metavar="HOST:PORT", help="Without a hostfile: where machine 0 is.", **_PANEL)],
    "slurm": Annotated[bool, typer.Option("--slurm", help="Write a SLURM job script, which requeues itself, and stop. Words behind -- become #SBATCH lines.", **_PANEL)],
    "submit": Annotated[bool, typer.Option("--submit", help="With --slurm: hand it to sbatch.", **_PANEL)],
    "dry_run": Annotated[bool, typer.Option("--dry-run", help="Print what it will cost (see dlmconvert plan) and stop; nothing is written.")],
}


class LaunchedCommand(TyperCommand):
    """A command whose words behind `--` are not its own."""

    def parse_args(self, ctx, args):
        if "--" in args:
            at = args.index("--")
            ctx.meta[_BEHIND] = tuple(args[at + 1 :])
            args = args[:at]
        return super().parse_args(ctx, args)


def launched(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options above; it is called with `launching=Launching(...)`."""
    own = [parameter for parameter in inspect.signature(verb, eval_str=True).parameters.values() if parameter.name != "launching"]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=getattr(ALONE, name)) for name, annotation in _OPTIONS.items()
    ]
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)

    @functools.wraps(verb)
    def call(context: typer.Context, **values: Any) -> None:
        chosen = {field.name: values.pop(field.name) for field in fields(Launching) if field.name in _OPTIONS}
        verb(**values, launching=Launching(**chosen, behind=context.meta.get(_BEHIND, ())))

    del call.__wrapped__  # its signature is another one
    call.__signature__ = inspect.Signature([context, *own, *more])
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in [context, *own, *more]}
    return call


def in_ranks(command: list[str], launching: Launching, overrides: list[str], find: Callable, begin: Callable) -> None:
    """Run stages in this process, or in as many as asked for: started here, on other machines, or by torchrun, srun, mpirun.

    command: the words that a process elsewhere is started with. find(overrides) -> (run folder, recipe). begin(overrides) -> (run
    folder, recipe, targets), having said which folder it is.
    """
    from dlmconvert.training.launchers import place_of

    _refuse_contradictions(launching)
    if launching.dry_run:
        return _show_plan(place_of(os.environ), launching, overrides, begin)
    together(command, launching, overrides, find, lambda place, words, ranks: _run_stages(place, overrides, words, begin, ranks))


def together(command: list[str], launching: Launching, overrides: list[str], find: Callable, work: Callable) -> None:
    """Call work(place, words, ranks) in this process (ranks: None), or in every one of as many as asked for.

    command, find: as for `in_ranks`. words: the overrides, with the engine that so many processes need.
    """
    from dlmconvert.cli.outcome import outcome_of
    from dlmconvert.runs.hosts import given_share
    from dlmconvert.runs.launch import OUTCOME, launch
    from dlmconvert.training.launchers import Place, check_place, place_of

    place = place_of(os.environ)
    if place is not None and place.count == 1 and (launching.processes or 1) > 1:
        place = None  # one task with several GPUs: its processes are started here
    given = given_share()
    share, nodes = (given, []) if given is not None else _share(launching, place, command)
    if launching.behind and not nodes:
        raise UserError(f"nothing to give {' '.join(launching.behind)} to", "words behind -- go to sbatch (--slurm) or ssh (--hostfile)", "leave them out")
    if share is not None:
        def rank(leave):
            _as_rank(place_of(os.environ), launching, overrides, find, work, outcome_of, leave)

        outcome = launch(share, rank, nodes, controlled=given is not None)
        if given is not None:
            import json

            from dlmconvert.cli.console import out

            out(f"{OUTCOME}{json.dumps(asdict(outcome))}}}")
            raise typer.Exit(outcome.code)
        if outcome.code:
            raise Told(outcome)
        return
    check_place(place, launching.processes)
    place = place or Place()
    if place.count == 1:
        return work(place, _words(place, launching, overrides, find), None)
    with _quiet(place) as leave:
        _as_rank(place, launching, overrides, find, work, outcome_of, leave)
        leave(Outcome())  # at once, as processes of our own do: threads of torch's process groups may abort an ordinary exit


def _show_plan(place: Any, launching: Launching, overrides: list[str], begin: Callable) -> None:
    """`--dry-run`: the plan of this command on the machines that it names; the first rank alone speaks."""
    from dlmconvert.cli.plan import show_plan
    from dlmconvert.runs.hosts import deal, read_hostfile
    from dlmconvert.training.launchers import local_count

    if place is not None and place.rank > 0:
        return
    processes, nodes = launching.processes, launching.nodes
    if launching.hostfile is not None:
        dealt = deal(read_hostfile(launching.hostfile), processes, nodes)
        processes, nodes = sum(number for _, number in dealt), len(dealt)
    elif place is not None and place.count > 1:
        processes, nodes = place.count, place.count // (local_count(os.environ) or place.count)
    _, recipe, targets = begin(overrides)
    show_plan(recipe, processes=processes, nodes=nodes, targets=targets)


def _refuse_contradictions(launching: Launching) -> None:
    if launching.submit and not launching.slurm:
        raise UserError("--submit without --slurm", "", "--slurm --submit writes a job script and hands it to sbatch")
    others = [flag for flag, value in (("--node-rank", launching.node_rank), ("--master", launching.master)) if value is not None]
    if launching.hostfile is not None and others:
        raise UserError(f"{others[0]} beside --hostfile", "the hostfile says where every machine is", f"leave {others[0]} out")
    if others and launching.nodes is None:
        raise UserError(f"{others[0]} without --nodes", "", "say over how many machines: --nodes N")
    if launching.slurm and (others or launching.hostfile is not None):
        raise UserError(f"{(others or ['--hostfile'])[0]} beside --slurm", "SLURM chooses the machines", "say how many: --nodes N")


def _share(launching: Launching, place: Any, command: list[str]) -> tuple[Any, list[tuple[str, list[str]]]]:
    """What is started here, and the commands for the other machines; (None, []) when nothing is."""
    from dlmconvert.runs.hosts import deal, local_share, read_hostfile, share_of_node, shares_of_hosts, ssh_command

    processes, nodes = launching.processes, launching.nodes
    if launching.hostfile is not None:
        if place is not None and place.count > 1:
            raise UserError(f"--hostfile, but a launcher has started {place.count} processes already", "", "leave one of the two out")
        dealt = deal(read_hostfile(launching.hostfile), processes, nodes)
        shares = shares_of_hosts(dealt, launching.hostfile)
        if shares[0].total == 1:
            return None, []
        commands = [(host.name, ssh_command(host, launching.behind, command, share, os.environ)) for (host, _), share in zip(dealt[1:], shares[1:], strict=True)]
        return shares[0], commands
    if nodes is not None and (share := share_of_node(os.environ, place, processes, nodes, launching.node_rank, launching.master)) is not None:
        return share, []
    return (local_share(processes), []) if place is None and (processes or 1) > 1 else (None, [])


def _as_rank(place: Any, launching: Launching, overrides: list[str], find: Callable, work: Callable, outcome_of: Callable, leave: Callable) -> None:
    """Meet the other ranks, work, part. When anything fails anywhere, leave(the one outcome that is to be told)."""
    from dlmconvert.runs.follow import about, refusal_by
    from dlmconvert.training.ranks import Ranks

    mine: dict[str, Any] = {}
    ranks: list[Any] = []

    def asked() -> None:
        mine.update(about(find(_words(place, launching, overrides, find))[1]))

    def meet() -> None:
        ranks.append(Ranks(place, mine, leave))
        if "failed" in mine and place.rank == 0:
            raise Told(Outcome(**mine["failed"]))
        ranks[0].meet(refusal_by(mine, place.count))

    # What is wrong with the command is wrong on every rank: the others hear it as well, and one tells.
    if (outcome := outcome_of(asked)).code:
        mine["failed"] = asdict(outcome)
    outcome = outcome_of(meet)
    if not outcome.code:
        outcome = outcome_of(lambda: work(place, _words(place, launching, overrides, find), ranks[0]))
    if not outcome.code:
        outcome = outcome_of(ranks[0].leave)
    if outcome.code:
        leave(ranks[0].failed(outcome) if ranks else outcome)


def _words(place: Any, launching: Launching, overrides: list[str], find: Callable) -> list[str]:
    from dlmconvert.runs.engines import engine_words

    return engine_words(*find(overrides), overrides, place.count, launching.processes)


def _run_stages(place: Any, overrides: list[str], words: list[str], begin: Callable, ranks: Any) -> None:
    from dlmconvert.cli.console import ConsoleReporter, out
    from dlmconvert.runs.follow import follow
    from dlmconvert.runs.report import result_text
    from dlmconvert.runs.runner import run_stages

    if place.rank > 0:
        return follow(ranks)
    reporter = ConsoleReporter()
    folder, recipe, targets = begin(words)
    if words != overrides:
        reporter.say(f"{place.count} processes: engine.name=deepspeed (the recipe says single)" if place.count > 1 else "engine.name=deepspeed, as this run was begun")
    worked = run_stages(folder, recipe, targets, reporter, words, ranks)
    if ranks is not None:
        ranks.tell({"end": True})
    if not worked:
        out("everything is done already")
    out(result_text(folder))


class _quiet:
    """In a rank that another program has started: only the first one speaks. Gives a function that ends the process with an outcome,
    shown by whoever is to tell it."""

    def __init__(self, place: Any):
        self.silent = place.rank > 0 and not os.environ.get("DLMCONVERT_DEBUG")

    def __enter__(self) -> Callable[[Outcome], None]:
        sys.stdout.flush()
        sys.stderr.flush()
        self.screens = {number: os.dup(number) for number in (1, 2)} if self.silent else {}
        if self.silent:
            with tempfile.TemporaryFile() as log:
                for number in self.screens:
                    os.dup2(log.fileno(), number)
        return self._leave

    def _leave(self, outcome: Outcome) -> None:
        from dlmconvert.cli.console import show_error

        try:
            self.__exit__()
            if outcome.what and not outcome.told:
                show_error(outcome.what, outcome.why, outcome.next_step)
            sys.stdout.flush()
        finally:
            os._exit(outcome.code)  # a library that waits for a rank that has gone must not hold this one

    def __exit__(self, *error: object) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, screen in self.screens.items():
            os.dup2(screen, number)


def write_slurm_job(command: list[str], launching: Launching, folder: Any, recipe: Any, targets: list[str]) -> None:
    """`--slurm`: the script into the run folder, and what to do with it, or its submission.

    command: of one rank, with the run folder named, so that a requeued job finds it whatever has been started since.
    """
    from dlmconvert.cli.console import ConsoleReporter, console, out
    from dlmconvert.runs.engines import check_engine
    from dlmconvert.runs.hosts import evenly
    from dlmconvert.runs.runner import order_of
    from dlmconvert.runs.slurm import job_script, submit, write_script

    _refuse_contradictions(launching)
    nodes, processes = launching.nodes or 1, launching.processes or 1
    reporter = ConsoleReporter()
    check_engine(recipe, [stage.name for stage in order_of(targets, recipe)], processes, reporter)
    path = folder.path.resolve() / f"slurm-{command[0]}.sh"
    text = job_script(
        title=shlex.join(["dlmconvert", *command, *([f"--nodes={launching.nodes}"] if launching.nodes else [])]),
        name=folder.name,
        words=command,
        log=folder.path.resolve() / "slurm-%j.log",
        nodes=nodes,
        processes_per_node=evenly(processes, nodes),
        gpus=recipe.engine.device != "cpu",
        options=launching.behind,
    )
    kept = write_script(path, text)
    if kept is not None:
        reporter.say(f"the script that was there is kept as {kept}")
    out(str(path))
    if launching.submit:
        return out(submit(path))
    console.print(f"next: sbatch {shlex.quote(str(path))}", soft_wrap=True, markup=False)
