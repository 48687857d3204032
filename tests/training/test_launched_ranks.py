"""Who a process is, as its launcher says."""

from __future__ import annotations

import pytest

from dlmconvert.errors import UserError
from dlmconvert.training.ranks import Place, check_place, place_of, shares


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(3, 8, 1)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, Place(1, 2, 0)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}, Place(5, 8, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, None),  # the batch script itself
        ({"RANK": "3"}, None),
    ],
)
def test_launchers(environment, place):
    assert place_of(environment) == place


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
