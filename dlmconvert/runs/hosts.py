"""Several machines for one run: which ranks this one starts, and the commands that start the others.

`--processes` is the total. The machines come from a hostfile (the first one's command starts the others over ssh), or every machine
gets the same command and is told its number.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dlmconvert.errors import UserError
from dlmconvert.training.launchers import DEFAULT_PORT, Place, expand_nodes, is_own, own_address, slurm_node

NODE = "DLMCONVERT_NODE"  # the share of a machine that a hostfile's first machine has started
_PASSED_ON = ("PYTHONPATH", "LD_LIBRARY_PATH", "DLMCONVERT_DEBUG", "DS_ACCELERATOR", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")
_PASSED_ON_PREFIXES = ("OMP_", "NCCL_", "GLOO_", "CUDA_", "UCX_")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY", re.IGNORECASE)


@dataclass(frozen=True)
class Share:
    """Ranks first .. first + count - 1 of `total` run on this machine; all meet at address:port, where rank 0 is."""

    first: int
    count: int
    total: int
    address: str
    port: int


@dataclass(frozen=True)
class Host:
    """name: as ssh takes it, `user@` included. slots: processes that it has room for, if the file says."""

    name: str
    slots: int | None = None

    @property
    def address(self) -> str:
        return self.name.rpartition("@")[2]


def local_share(processes: int) -> Share:
    return Share(0, processes, processes, "127.0.0.1", free_port())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def share_of_node(environment: Mapping[str, str], place: Place | None, processes: int | None, nodes: int, node_rank: int | None, master: str | None) -> Share | None:
    """The share of one of several machines that were each given the same command; None where a launcher has started every rank.

    Raises UserError when it is not said which machine this is, or where the first one is.
    """
    slurm = slurm_node(environment)
    one_a_node = slurm is not None and slurm[1] == nodes and (processes or nodes) > nodes
    if place is not None and place.count > 1 and not one_a_node:
        if node_rank is not None or master is not None:
            flag = "--node-rank" if node_rank is not None else "--master"
            raise UserError(f"{flag}, but a launcher has started {place.count} processes already", "it says itself which machine is which", f"leave {flag} out")
        return None
    if node_rank is None and one_a_node:
        assert slurm is not None
        node_rank = slurm[0]
        where = expand_nodes(environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"])
        master = master or f"{where[0]}:{DEFAULT_PORT}"
    if nodes == 1:
        return None
    if processes is None:
        raise UserError(f"--nodes {nodes} without --processes", "", f"say how many processes in all, one a GPU: --processes {8 * nodes} --nodes {nodes}")
    if node_rank is None or master is None:
        missing = " and ".join(flag for flag, value in (("--node-rank", node_rank), ("--master", master)) if value is None)
        raise UserError(
            f"--nodes {nodes} without {missing}",
            "nothing in the environment says which machine this is",
            "on every machine: --node-rank 0 (1, 2, ...) --master HOST_OF_NODE_0; or --hostfile FILE on the first one; or --slurm",
        )
    if node_rank >= nodes:
        raise UserError(f"--node-rank {node_rank} of --nodes {nodes}", f"they are numbered 0 to {nodes - 1}")
    each = evenly(processes, nodes)
    address, port = host_and_port(master)
    return Share(node_rank * each, each, processes, address, port)


def evenly(processes: int, nodes: int) -> int:
    """Processes of one machine. Raises UserError when they cannot be dealt evenly."""
    if processes % nodes:
        below, above = processes // nodes * nodes, -(-processes // nodes) * nodes
        raise UserError(f"--processes {processes} cannot be dealt to {nodes} machines", "it is the total, the same number on each", f"--processes {above}" + (f" or {below}" if below else ""))
    return processes // nodes


def host_and_port(text: str) -> tuple[str, int]:
    """`gpu1:29500`, `gpu1` (port 29500), `[fe80::1]:29500`. Raises UserError."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:]+)\]|([^:\[\]\s]+))(?::(\d{1,5}))?", text)
    if not found or int(found[3] or DEFAULT_PORT) > 65535:
        raise UserError(f"--master {text} is not HOST:PORT", "", f"as in --master gpu1:{DEFAULT_PORT}")
    return found[1] or found[2], int(found[3] or DEFAULT_PORT)


def read_hostfile(path: str) -> list[Host]:
    """Hosts in order, as DeepSpeed writes them: `gpu1 slots=8` a line, # comments. Raises UserError with the line."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the hostfile {path}", str(error), "a line a machine, as in: gpu1 slots=8") from error
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        # A name that begins with a dash would be an option of ssh.
        found = re.fullmatch(r"(?P<name>(?:[\w.-]+@)?[\w\[][\w.:\[\]-]*)(?:\s+slots\s*=\s*(?P<slots>[1-9]\d*))?", line, re.ASCII)
        if not found or line.startswith("-"):
            raise UserError(f"{path}, line {number}: {line!r} is not a host", "", "a line a machine, as in: gpu1 slots=8")
        if found["name"] in [host.name for host in hosts]:
            raise UserError(f"{path}, line {number}: {found['name']} is there twice", "", "give it all its slots in one line")
        hosts.append(Host(found["name"], int(found["slots"]) if found["slots"] else None))
    if not hosts:
        raise UserError(f"the hostfile {path} names no host", "", "a line a machine, as in: gpu1 slots=8")
    return hosts


def deal(hosts: Sequence[Host], processes: int | None, nodes: int | None) -> list[tuple[Host, int]]:
    """(host, its number of processes), in order. With `nodes`, the first so many hosts, evenly; else they are filled up in order.

    Raises UserError when there is no room.
    """
    if nodes is not None and nodes > len(hosts):
        raise UserError(f"--nodes {nodes}, but the hostfile names {len(hosts)}", "", "add hosts to it, or lower --nodes")
    hosts = hosts[:nodes]
    room = [host.slots for host in hosts]
    if processes is None:
        if None in room:
            bare = next(host.name for host in hosts if host.slots is None)
            raise UserError(f"how many processes? The hostfile gives {bare} no slots", "", "--processes N (the total), or slots=N behind every host")
        return [(host, host.slots or 1) for host in hosts]
    if nodes is not None or None in room:
        each = evenly(processes, len(hosts))
        dealt = [(host, each) for host in hosts]
    else:
        dealt, left = [], processes
        for host in hosts:
            taken = min(left, host.slots or 0)
            left -= taken
            dealt.append((host, taken))
        if left:
            raise UserError(f"--processes {processes}, but the hostfile has {processes - left} slots", "one process a GPU", "lower --processes, or add hosts or slots")
    for host, count in dealt:
        if host.slots is not None and count > host.slots:
            raise UserError(f"{count} processes on {host.name}, which has slots={host.slots}", f"--processes {processes} over {len(hosts)} machines", "lower --processes, or raise --nodes")
    return [(host, count) for host, count in dealt if count]


def shares_of_hosts(dealt: Sequence[tuple[Host, int]], path: str) -> list[Share]:
    """The share of each host, of which this machine must be the first. Raises UserError when it is not."""
    first = dealt[0][0]
    if not is_own(first.address):
        raise UserError(
            f"the first host of {path} is {first.name}, this machine is {socket.gethostname()}",
            "rank 0 runs on the first host, where the command is given",
            f"run it on {first.name}, or put this machine first",
        )
    # Here its own name may mean the loopback: what counts is the address by which the others see it.
    address = own_address(dealt[1][0].address) if len(dealt) > 1 else "127.0.0.1"
    total, port = sum(count for _, count in dealt), free_port()
    shares, begun = [], 0
    for _, count in dealt:
        shares.append(Share(begun, count, total, address, port))
        begun += count
    return shares


def ssh_command(host: Host, options: Sequence[str], words: Sequence[str], share: Share, environment: Mapping[str, str]) -> list[str]:
    """The ssh command that starts a machine's share: in the same folder, by the same Python, with what it needs of the environment.

    options: of ssh, from behind `--`. words: of dlmconvert, without those that launch. No secret is passed on.
    """
    passed = {name: value for name, value in environment.items() if (name in _PASSED_ON or name.startswith(_PASSED_ON_PREFIXES)) and not _SECRET.search(name)}
    if "PYTHONPATH" in passed:
        passed["PYTHONPATH"] = os.pathsep.join(os.path.abspath(part) for part in passed["PYTHONPATH"].split(os.pathsep) if part)
    passed[NODE] = json.dumps(asdict(share))
    assignments = [f"{name}={value}" for name, value in sorted(passed.items())]
    remote = f"cd {shlex.quote(os.getcwd())} && exec env {shlex.join([*assignments, sys.executable, '-m', 'dlmconvert', *words])}"
    # Without a terminal nobody could type a password; a machine that has gone is noticed.
    return ["ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3", *options, host.name, remote]


def given_share() -> Share | None:
    """What the first machine has told this one to start. Taken out of the environment: the ranks are no machines."""
    text = os.environ.pop(NODE, None)
    return Share(**json.loads(text)) if text else None
