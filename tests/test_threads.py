from __future__ import annotations

import pytest

from dlmconvert.threads import spin_briefly


@pytest.mark.parametrize(
    ("said", "then"),
    [
        ({}, {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
        ({"OMP_WAIT_POLICY": "passive"}, {"OMP_WAIT_POLICY": "passive"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
    ],
)
def test_what_the_user_says_of_waiting_threads_stands(monkeypatch, said, then):
    environment = dict(said)
    monkeypatch.setattr("os.environ", environment)
    spin_briefly()
    assert environment == then
