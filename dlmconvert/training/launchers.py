"""Who a process is among many, as the program that started it says: torchrun, `deepspeed`, `srun`, mpirun, or `--processes`.

Only environments are read here; nothing heavy is imported.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from dlmconvert.errors import UserError

DEFAULT_PORT = 29500
_LAUNCHERS = (  # rank, number of ranks, rank on its machine
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, the deepspeed launcher, and `--processes`
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)
_LOCAL_COUNTS = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_SPECIAL_STEPS = 0xFFFFFFF0  # from here on SLURM numbers what is no srun: the batch script, the shell of salloc


@dataclass(frozen=True)
class Place:
    """rank: this process, from 0. count: of all processes. local_rank: within its machine, which is also its GPU."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0


def place_of(environment: Mapping[str, str]) -> Place | None:
    """What a launcher has put into the environment; None when this process was started by itself.

    A batch script of SLURM and the shell of `salloc` carry SLURM_NTASKS without being one of the tasks: SLURM_STEP_ID tells.
    Raises UserError when a variable is no number, or when a launcher does not say which process of its machine this is.
    """
    for rank, count, local_rank in _LAUNCHERS:
        if rank not in environment or count not in environment:
            continue
        if rank.startswith("SLURM") and not _in_slurm_step(environment):
            continue
        if rank == "PMI_RANK" and local_rank not in environment and _in_slurm_step(environment):
            continue  # srun speaks PMI as well
        place = Place(_number(environment, rank), _number(environment, count), _number(environment, local_rank, 0))
        if place.count > 1 and local_rank not in environment:
            raise UserError(f"{rank} and {count} are set, {local_rank} is not", "it says which GPU of its machine is this process's own", f"set {local_rank} in every process, or start them with torchrun or --processes")
        return place
    return None


def check_place(place: Place | None, processes: int | None) -> None:
    """Raise UserError when a launcher started another number of processes than `--processes` asks for."""
    if place is not None and processes is not None and place.count != processes:
        raise UserError(f"--processes {processes}, but a launcher started {place.count} (WORLD_SIZE)", "", "leave --processes out under torchrun, srun or mpirun")


def slurm_node(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """(number of this node, number of nodes) of a job step with one task a node; None elsewhere."""
    if not _in_slurm_step(environment) or "SLURM_NODEID" not in environment or "RANK" in environment:
        return None
    tasks, nodes = _number(environment, "SLURM_NTASKS", 1), _number(environment, "SLURM_STEP_NUM_NODES", _number(environment, "SLURM_NNODES", 1))
    return (_number(environment, "SLURM_NODEID"), nodes) if tasks == nodes else None


def _in_slurm_step(environment: Mapping[str, str]) -> bool:
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _SPECIAL_STEPS


def _number(environment: Mapping[str, str], name: str, otherwise: int | None = None) -> int:
    text = environment.get(name, "")
    if not text and otherwise is not None:
        return otherwise
    if not text.isdigit():
        raise UserError(f"{name}={text!r} in the environment is not a number", "a launcher sets it", f"unset {name}, or start through a launcher")
    return int(text)


def local_count(environment: Mapping[str, str]) -> int | None:
    """Processes on this machine, where the launcher says so."""
    return next((int(environment[name]) for name in _LOCAL_COUNTS if environment.get(name, "").isdigit()), None)


def meeting_point(environment: Mapping[str, str], place: Place) -> tuple[str, int]:
    """Host and port where the ranks find each other: MASTER_ADDR and MASTER_PORT, else the first host of a SLURM step, else this
    machine when all ranks are on it. Raises UserError when nobody says."""
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if address and port:
        return address, _number(environment, "MASTER_PORT")
    if _in_slurm_step(environment):
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or environment.get("SLURM_NODELIST")
        if nodes:
            job = f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
            return address or expand_nodes(nodes)[0], int(port) if port else _port_of(job)
    if local_count(environment) == place.count:
        # mpirun's own helper is the parent of all ranks of a machine.
        return address or "127.0.0.1", int(port) if port else _port_of(str(os.getppid()))
    missing = [name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if not value]
    raise UserError(
        f"rank {place.rank} of {place.count} does not know where the others are: {' and '.join(missing)} not set",
        "torchrun, srun and --processes say it; mpirun over several machines does not",
        f"export MASTER_ADDR=(host of rank 0) and MASTER_PORT={DEFAULT_PORT} (any free port) before the launcher",
    )


def _port_of(job: str) -> int:
    """The same port on every rank of a job, another one for another job."""
    return 20000 + zlib.crc32(job.encode()) % 12000  # below the ephemeral ports of Linux


def expand_nodes(text: str) -> list[str]:
    """`gpu[01-03,07],login` -> gpu01, gpu02, gpu03, gpu07, login. Several brackets in a name multiply.

    Raises UserError for what is no SLURM node list.
    """
    parts = re.split(r",(?![^\[]*\])", text.strip())  # a comma inside brackets divides numbers
    names = [name for part in parts for name in _expand(part.strip(), text)]
    if not all(re.fullmatch(r"[\w.-]+", name) for name in names):
        raise UserError(f"{text!r} is not a list of SLURM nodes", "as in node[01-03,07]", "export MASTER_ADDR and MASTER_PORT by hand")
    return names


def _expand(part: str, text: str) -> list[str]:
    head, opening, rest = part.partition("[")
    if not opening:
        return [part]
    inside, closing, tail = rest.partition("]")
    numbers = []
    for item in inside.split(","):
        first, dash, last = item.partition("-")
        if not closing or not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"{text!r} is not a list of SLURM nodes", f"{item!r} is neither a number nor a range", "export MASTER_ADDR and MASTER_PORT by hand")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last if dash else first) + 1)]
    return [head + number + end for number in numbers for end in _expand(tail, text)]


def own_address(towards: str) -> str:
    """The address by which this machine is reached from `towards` (nothing is sent). Loopback when that is this machine.

    Raises UserError when the name is not known.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError as error:
        raise UserError(f"cannot find a way to the host {towards!r}", str(error), "check its name (getent hosts NAME)") from error


def is_own(host: str) -> bool:
    """Whether a name or address is one of this machine."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
            return True
    except OSError:
        return False


def interface_of(address: str) -> str | None:
    """The network interface (`eth0`) that has this IPv4 address; None where the system does not tell."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, name.encode()[:15].ljust(256, b"\0"))  # SIOCGIFADDR
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
