"""The table of methods, as a user types it."""

from __future__ import annotations

import json

from command_line import dlmconvert

from dlmconvert.methods import METHODS


def test_the_table():
    told = dlmconvert("methods")
    assert told.code == 0 and all(name in told.out for name in METHODS) and "CART" in told.out


def test_one_method():
    told = dlmconvert("methods", "dream")
    assert told.code == 0
    for text in ("2508.15487", "departs:", "unverified:", "CART, p = 0.1, over masked tokens"):
        assert text in told.out


def test_for_scripts():
    assert [row["name"] for row in json.loads(dlmconvert("methods", "--json").out)] == list(METHODS)
    assert json.loads(dlmconvert("methods", "llada", "--json").out)["choices"]["alignment"] == "in_place"


def test_an_unknown_method():
    told = dlmconvert("methods", "lada")
    assert told.code == 2 and "did you mean 'llada'" in told.err
