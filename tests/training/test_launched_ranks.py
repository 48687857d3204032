"""Who a process is, and where the others are, as its launcher says."""

from __future__ import annotations

import pytest

from dlmconvert.errors import UserError
from dlmconvert.training.launchers import (
    Place,
    check_place,
    expand_nodes,
    interface_of,
    is_own,
    meeting_point,
    own_address,
    place_of,
    slurm_node,
)
from dlmconvert.training.ranks import shares

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu1", "MASTER_PORT": "1234"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SRUN = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_NODEID": "2", "SLURM_STEP_NUM_NODES": "4",
    "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[03-05,11]", "SLURM_STEP_NODELIST": "node[04-05]",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (TORCHRUN, Place(3, 8, 1)),
        (SRUN | TORCHRUN, Place(3, 8, 1)),  # torchrun inside a job
        (OPEN_MPI, Place(1, 2, 0)),
        (SRUN | OPEN_MPI, Place(1, 2, 0)),
        (MPICH, Place(1, 4, 1)),
        (SRUN, Place(5, 8, 1)),
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}, Place(5, 8, 1)),  # srun --mpi=pmi2
        (SRUN | MPICH, Place(1, 4, 1)),  # mpirun starts its helpers by srun, one a node
        ({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}, None),  # the batch script itself
        (SRUN | {"SLURM_STEP_ID": "4294967290"}, None),  # the shell of salloc
        ({"RANK": "3"}, None),
    ],
)
def test_launchers(environment, place):
    assert place_of(environment) == place


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK='one' in the environment is not a number"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_RANK and PMI_SIZE are set, MPI_LOCALRANKID is not"),
    ],
)
def test_a_launcher_that_says_half(environment, message):
    with pytest.raises(UserError, match=message):
        place_of(environment)


def test_where_the_ranks_meet():
    assert meeting_point(TORCHRUN, Place(3, 8, 1)) == ("gpu1", 1234)
    address, port = meeting_point(SRUN, Place(5, 8, 1))
    assert address == "node04" and 20000 <= port < 32000
    assert port == meeting_point(SRUN | {"SLURM_PROCID": "0"}, Place(0, 8, 0))[1] != meeting_point(SRUN | {"SLURM_JOB_ID": "78"}, Place(5, 8, 1))[1]
    assert meeting_point(SRUN | {"MASTER_PORT": "9"}, Place(5, 8, 1)) == ("node04", 9)
    assert meeting_point(OPEN_MPI, Place(1, 2, 0))[0] == "127.0.0.1"  # all on this machine
    with pytest.raises(UserError, match="rank 1 of 4 does not know where the others are: MASTER_ADDR and MASTER_PORT not set"):
        meeting_point(MPICH, Place(1, 4, 1))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("login", ["login"]),
        ("node[01-03,07]", ["node01", "node02", "node03", "node07"]),
        ("a1,b[9-11],c", ["a1", "b9", "b10", "b11", "c"]),
        ("rack[0-1]n[1,3]-ib", ["rack0n1-ib", "rack0n3-ib", "rack1n1-ib", "rack1n3-ib"]),
    ],
)
def test_lists_of_nodes(text, names):
    assert expand_nodes(text) == names


@pytest.mark.parametrize("text", ["", "node[", "node[a-b]", "node[1-2"])
def test_what_is_no_list_of_nodes(text):
    with pytest.raises(UserError, match="is not a list of SLURM nodes"):
        expand_nodes(text)


def test_one_task_a_node():
    one_each = SRUN | {"SLURM_NTASKS": "4"}
    assert slurm_node(one_each) == (2, 4)
    assert slurm_node(SRUN) is None and slurm_node({}) is None and slurm_node(one_each | TORCHRUN) is None


def test_rows_are_dealt_evenly():
    assert shares(16, 4) == 4
    with pytest.raises(UserError) as caught:
        shares(6, 4, "sft")
    assert "sft.rows_per_step=6 cannot be dealt to 4 processes" in str(caught.value) and "8 or 4" in str(caught.value)


def test_a_launcher_and_the_flag_must_agree():
    check_place(Place(0, 4, 0), 4)
    check_place(None, 4)
    with pytest.raises(UserError, match="--processes 2, but a launcher started 4"):
        check_place(Place(0, 4, 0), 2)


def test_addresses():
    assert is_own("127.0.0.1") and is_own("localhost") and not is_own("192.0.2.1")
    assert own_address("127.0.0.1") == "127.0.0.1" and interface_of("127.0.0.1") == "lo" and interface_of("192.0.2.1") is None
    with pytest.raises(UserError, match="cannot find a way to the host"):
        own_address("no-such-host.invalid")
