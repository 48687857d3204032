"""The processes that train together: who this one is, and the few words they exchange besides gradients.

Nothing heavy is imported here until processes meet.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dlmconvert.errors import UserError

COLLECTIVE_TIMEOUT = timedelta(hours=2)  # the longest that one rank may let the others wait in the middle of a step
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, the deepspeed launcher, and `--processes`
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Place:
    """rank: this process, from 0. count: of all processes. local_rank: within its machine, which is also its GPU."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0


def place_of(environment: Mapping[str, str]) -> Place | None:
    """What a launcher has put into the environment; None when this process was started by itself.

    A batch script of SLURM (no `srun` in front) carries SLURM_NTASKS without being one of the tasks: SLURM_STEP_ID tells.
    """
    for rank, count, local_rank in _LAUNCHERS:
        if rank not in environment or count not in environment:
            continue
        if rank.startswith("SLURM") and "SLURM_STEP_ID" not in environment:
            continue
        return Place(int(environment[rank]), int(environment[count]), int(environment.get(local_rank, 0)))
    return None


def check_place(place: Place | None, processes: int | None) -> None:
    """Raise UserError when a launcher started another number of processes than `--processes` asks for."""
    if place is not None and processes is not None and place.count != processes:
        raise UserError(f"--processes {processes}, but a launcher started {place.count} (WORLD_SIZE)", "", "leave --processes out under torchrun, srun or mpirun")


class Solo:
    """One process, which agrees with itself."""

    rank, count, local_rank = 0, 1, 0

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        return values

    def share(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        pass

    def tell(self, order: dict[str, Any]) -> None:
        pass

    def leave(self) -> None:
        pass


class Ranks:
    """Several processes over torch.distributed. `sum`, `share` and `barrier` are collective: every rank calls them in the same order.

    Small talk goes over gloo on the CPU, gradients over NCCL where there are GPUs.
    """

    def __init__(self, place: Place):
        import torch
        import torch.distributed as dist

        self.rank, self.count, self.local_rank = place.rank, place.count, place.local_rank
        os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.count), LOCAL_RANK=str(place.local_rank))  # DeepSpeed reads them
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(
                f"rank {place.rank} of {place.count} does not know where the others are: {' and '.join(missing)} not set",
                "torchrun and --processes set them; srun and mpirun do not",
                "export MASTER_ADDR=(host of rank 0) and MASTER_PORT=29500 (any free port) before the launcher",
            )
        gpus = torch.cuda.is_available()
        if gpus:
            torch.cuda.set_device(place.local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", rank=place.rank, world_size=place.count, timeout=COLLECTIVE_TIMEOUT)
        self._store = dist.distributed_c10d._get_default_store()
        self._orders = 0

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

    def barrier(self) -> None:
        self.sum({"": 0.0})

    def tell(self, order: dict[str, Any]) -> None:
        """Rank 0 says what to do next; the others read it in `listen`, however long that takes."""
        if self.rank == 0:
            self._store.set(f"order-{self._orders}", pickle.dumps(order))
            self._orders += 1

    def listen(self) -> dict[str, Any]:
        """The next order. Waits in short turns, so that a signal is heard."""
        while not self._store.check([f"order-{self._orders}"]):
            time.sleep(0.05)
        order = pickle.loads(self._store.get(f"order-{self._orders}"))
        self._orders += 1
        return order

    def leave(self) -> None:
        import torch.distributed as dist

        self.barrier()  # rank 0 holds the store: it leaves last
        dist.destroy_process_group()


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
