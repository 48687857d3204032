"""The tiny models and their exports, made once a session: each verified export costs a process."""

from __future__ import annotations

import pytest
from export_models import FAMILIES, GENERATION, VERIFIED, facts, write_model

from dlmconvert.exporting.package import export_folder


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        write_model(folder / family, family)
    return folder


@pytest.fixture(scope="session")
def exports(models_folder, tmp_path_factory):
    """family -> ExportReport; those of VERIFIED were compared with the model in a fresh process."""
    folder = tmp_path_factory.mktemp("exports")
    return {
        family: export_folder(
            models_folder / family, folder / family, "native",
            card=facts(), generation=GENERATION, verify=family in VERIFIED, shard_bytes=30_000 if family == "llama" else 10**9,
        )
        for family in FAMILIES
    }  # fmt: skip
