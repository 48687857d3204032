"""The processes that train together: who this one is, and the few words they exchange besides gradients.

Nothing heavy is imported here until processes meet.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from dlmconvert.errors import EXIT_FAILED, Outcome, UserError
from dlmconvert.training.launchers import Place, interface_of, is_own, local_count, meeting_point, own_address
from dlmconvert.training.lifeline import JOIN_SECONDS, Hub, Spoke

COLLECTIVE_TIMEOUT = timedelta(hours=2)  # the longest that one rank may let the others wait in the middle of a step


class Solo:
    """One process, which agrees with itself.

    stands_for: of how many ranks it does the work, each rank's micro-batches as that rank would cut them (`replay`).
    """

    rank, count, local_rank = 0, 1, 0

    def __init__(self, stands_for: int = 1):
        self.stands_for = stands_for

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        return values

    def share(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        pass

    def tell(self, order: dict[str, Any]) -> None:
        pass

    def leave(self) -> None:
        pass


class Ranks:
    """Several processes over torch.distributed. `sum`, `share` and `barrier` are collective: every rank calls them in the same order.

    Small talk goes over gloo on the CPU, gradients over NCCL where there are GPUs, orders and failures over a line of their own
    (`lifeline.py`). about: what this process says about itself, by which rank 0 may refuse it in `meet`. leave(outcome): ends this
    process; called when it does not do so itself after another rank has failed.

    Raises UserError when the others cannot be found.
    """

    stands_for = 1  # for itself

    def __init__(self, place: Place, about: dict[str, Any], leave: Callable[[Outcome], None]):
        self.rank, self.count, self.local_rank = place.rank, place.count, _gpu_of(place)
        address, port = meeting_point(os.environ, place)
        # DeepSpeed reads them.
        os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.count), LOCAL_RANK=str(self.local_rank), MASTER_ADDR=address, MASTER_PORT=str(port))
        self._store = _common_store(place, address, port)
        if place.rank == 0:
            token = secrets.token_hex(16)
            self.line: Hub | Spoke = Hub(place.count, address if is_own(address) else own_address(address), token)
            self._store.set("lifeline", f"{token} {self.line.address}")
        else:
            token, _, where = _read(self._store, "lifeline", place).partition(" ")
            self.line = Spoke(place.rank, place.count, where, token, about)
        self.line.leave = leave

    def meet(self, refusal: Callable[[int, str, dict[str, Any]], Outcome | None]) -> None:
        """Wait for all, and connect them. refusal(rank, host, about): on rank 0, why that rank may not take part.

        Raises Told when a rank is refused or has failed, UserError when some do not come.
        """
        import torch
        import torch.distributed as dist

        if isinstance(self.line, Hub):
            self.line.gather(refusal)
        else:
            self.line.join()
        interface = interface_of(self.line.own_address)
        if interface is not None:  # else gloo takes the address of the host's name, which is often a loopback
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        gpus = torch.cuda.is_available()
        if gpus:
            torch.cuda.set_device(self.local_rank)
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore("ranks", self._store), rank=self.rank, world_size=self.count, timeout=COLLECTIVE_TIMEOUT)

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Each value summed over the ranks, in float64."""
        import torch
        import torch.distributed as dist

        together = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(together)
        return dict(zip(values, together.tolist(), strict=True))

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, device="cpu")
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        import torch.distributed as dist

        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.sum({"": 0.0})

    def tell(self, order: dict[str, Any]) -> None:
        """Rank 0 says what to do next; the others read it in `listen`, however long that takes."""
        if isinstance(self.line, Hub):
            self.line.check()
            self.line.order(order)

    def listen(self) -> dict[str, Any]:
        """The next order. Raises Told when another rank has failed; a signal is heard meanwhile."""
        assert isinstance(self.line, Spoke)
        return self.line.next_order()

    def failed(self, outcome: Outcome) -> Outcome:
        """This rank cannot go on. The others hear it; what comes back is to be told: the first cause, wherever that was."""
        return self.line.failed(outcome)

    def leave(self) -> None:
        import torch.distributed as dist

        self.barrier()  # rank 0 holds the store: it leaves last
        dist.destroy_process_group()
        self.line.close()


def _gpu_of(place: Place) -> int:
    """The GPU of a rank: its number on its machine, or the only one that a scheduler lets it see.

    Raises UserError when there are fewer GPUs than processes.
    """
    import torch

    gpus = torch.cuda.device_count()
    if place.local_rank < gpus or gpus == 0:
        return place.local_rank
    here = local_count(os.environ)
    if gpus == 1 and here is None:
        return 0
    raise UserError(f"{here or 'more'} processes on this machine, but {gpus} GPU{'' if gpus == 1 else 's'}", "every process needs one of its own", f"take --processes {gpus} a machine")


def _common_store(place: Place, address: str, port: int) -> Any:
    """torch's key-value store, on rank 0 or where torchrun keeps one. Raises UserError when it cannot be reached in time."""
    from torch.distributed import PrefixStore, TCPStore

    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = place.rank == 0 and not agent
    until = time.monotonic() + JOIN_SECONDS
    while not serves:  # torch's own waiting is deaf to signals
        try:
            socket.create_connection((address, port), timeout=5).close()
            break
        except OSError as error:
            if time.monotonic() > until:
                what = f"rank {place.rank} of {place.count} cannot reach rank 0 at {address}:{port}"
                raise UserError(what, str(error), "look whether rank 0 has started, and whether a firewall is between", exit_code=EXIT_FAILED) from error
            time.sleep(0.2)
    try:
        store = TCPStore(address, port, is_master=serves, timeout=timedelta(seconds=JOIN_SECONDS), wait_for_workers=False)
    except RuntimeError as error:
        what = f"rank {place.rank} of {place.count} cannot {'listen' if serves else 'connect'} at {address}:{port}"
        raise UserError(what, str(error).splitlines()[0], "take another port: MASTER_PORT, or --master HOST:PORT", exit_code=EXIT_FAILED) from error
    return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _read(store: Any, key: str, place: Place) -> str:
    until = time.monotonic() + JOIN_SECONDS
    while not store.check([key]):
        if time.monotonic() > until:
            raise UserError(f"rank {place.rank} of {place.count} waited {JOIN_SECONDS / 60:.0f} minutes for rank 0", "", "look why rank 0 did not start", exit_code=EXIT_FAILED)
        time.sleep(0.05)
    return store.get(key).decode()


def shares(rows_per_step: int, count: int, name: str = "train") -> int:
    """Rows of the global batch that each rank takes. Raises UserError when they cannot be dealt evenly."""
    if rows_per_step % count:
        below, above = rows_per_step // count * count, -(-rows_per_step // count) * count
        raise UserError(
            f"{name}.rows_per_step={rows_per_step} cannot be dealt to {count} processes",
            "every process takes the same number of rows of each step",
            f"set {name}.rows_per_step={above}" + (f" or {below}" if below else "") + ", or take another number of --processes",
        )
    return rows_per_step // count


def lost_peer(error: BaseException) -> bool:
    """Whether an error only says that another rank has gone: the other one knows why."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "recvValue", "Timed out")
    )
