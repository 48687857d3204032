"""Small predictors for the sampler tests: exact, and bit for bit the same in any batch.

Shapes: B rows, L positions, N positions asked for, V vocabulary.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from dlmconvert.diffusion.randomness import counter_hash, counter_uniform
from dlmconvert.sampling.budget import Plan

VECTORS = Path(__file__).parents[2].parent / "shared" / "vectors"


def vectors(name: str) -> dict:
    path = VECTORS / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return json.loads(path.read_text())


def plan(
    masked_BL: torch.Tensor, num_masked: list[int], step: int, num_steps: int, u_BL: torch.Tensor | None = None, eps: float = 1e-3
) -> Plan:
    """The state of one block that is the whole row."""
    rows = masked_BL.shape[0]
    u_BL = torch.zeros(masked_BL.shape, dtype=torch.float64) if u_BL is None else u_BL
    return Plan(masked_BL, torch.tensor(num_masked), torch.full((rows,), step), torch.full((rows,), num_steps), u_BL, eps)


class HashPredictor:
    """Logits that are a hash of everything visible in the row and of the position: any change of context changes them all.

    favourite: an id that always has the largest logit (to try to make the sampler produce it).
    """

    def __init__(self, vocab_size=23, mask_token_id=23, rows_of_output=26, alignment="shift", favourite=None):
        self.vocab_size, self.mask_token_id, self.alignment = vocab_size, mask_token_id, alignment
        self.rows_of_output, self.favourite = rows_of_output, favourite
        self.asked = []

    def predict(self, tokens_BL, wanted_BL, positions_BL, segments_BL):
        self.asked.append(int(wanted_BL.sum()))
        real_BL = torch.ones_like(tokens_BL) if segments_BL is None else (segments_BL == 0).long()
        context_B = (counter_hash(7, tokens_BL, positions_BL) * real_BL).sum(dim=1)
        context_N = context_B[:, None].expand(tokens_BL.shape)[wanted_BL]
        ids_V = torch.arange(self.rows_of_output)
        logits_NV = 8 * counter_uniform(9, context_N[:, None], positions_BL[wanted_BL][:, None], ids_V).float()
        if self.favourite is not None:
            logits_NV[:, self.favourite] = 50.0
        return logits_NV


class TablePredictor:
    """The exact conditionals of a joint distribution over `length` tokens that follow one start token (position 0, id 0).

    joint: tensor of `length` axes of size V. predict(i | visible) = sum over the other masked positions.
    """

    alignment = "shift"

    def __init__(self, joint: torch.Tensor):
        self.joint = joint
        self.length, self.vocab_size = joint.ndim, joint.shape[0]
        self.mask_token_id = self.vocab_size
        base = self.vocab_size + 1
        table = torch.zeros(base**self.length, self.length, self.vocab_size + 1, dtype=torch.float64)
        for code, state in enumerate(itertools.product(range(base), repeat=self.length)):
            for place in range(self.length):
                table[code, place, : self.vocab_size] = self.conditional(state, place)
        self.table = table.log()

    def conditional(self, state, place) -> torch.Tensor:
        """p(token at place | tokens of the state that are no mask), as a vector."""
        index = tuple(slice(None) if token == self.mask_token_id or at == place else token for at, token in enumerate(state))
        part = self.joint[index]
        axis = sum(1 for at in range(place) if isinstance(index[at], slice))
        mass_V = part.sum(dim=[a for a in range(part.ndim) if a != axis]) if part.ndim > 1 else part
        return mass_V / mass_V.sum()

    def predict(self, tokens_BL, wanted_BL, positions_BL, segments_BL):
        code_B = torch.zeros(tokens_BL.shape[0], dtype=torch.int64)
        for place in range(self.length):
            code_B = code_B * (self.vocab_size + 1) + tokens_BL[:, place + 1]
        rows_N, columns_N = torch.nonzero(wanted_BL, as_tuple=True)
        return self.table[code_B[rows_N], columns_N - 1]


def chi_square_limit(degrees: int, sigmas: float = 4.0) -> float:
    """Upper limit of a chi-square draw, `sigmas` standard deviations of a normal out (Wilson and Hilferty)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + sigmas * spread**0.5) ** 3


class TableWindowPredictor(TablePredictor):
    """The same conditionals, asked for columns: a "stored key" is the token that stood there, and a hidden state knows exactly the
    tokens that its query sees. So cached decoding and speculation can be held against the enumerated joint.

    attention, block_length: what it says of itself.
    """

    def __init__(self, joint: torch.Tensor, attention="context_causal", block_length=2, alignment="shift"):
        super().__init__(joint)
        self.attention, self.block_length, self.alignment = attention, block_length, alignment

    def new_store(self, num_rows, num_columns):
        class Store:
            tokens_RL = torch.zeros(num_rows, num_columns + 1, dtype=torch.int64)
            positions_RL = torch.zeros(num_rows, num_columns + 1, dtype=torch.int64)

            def keep_rows(self, rows):
                self.tokens_RL, self.positions_RL = self.tokens_RL[rows], self.positions_RL[rows]

        return Store()

    def forward_columns(self, tokens_BQ, positions_BQ, kept, seen_BQK, num_keys, store, columns_BQ, rows_B):
        rows, width = tokens_BQ.shape
        columns_BQ = columns_BQ.expand(rows, width)
        if store is None:
            known_BK, key_positions_BK = tokens_BQ, positions_BQ
        else:
            of_rows = torch.arange(rows) if rows_B is None else rows_B
            store.tokens_RL[of_rows[:, None], columns_BQ] = tokens_BQ
            store.positions_RL[of_rows[:, None], columns_BQ] = positions_BQ
            known_BK, key_positions_BK = store.tokens_RL[of_rows, :num_keys], store.positions_RL[of_rows, :num_keys]
        if seen_BQK is None:
            seen_BQK = torch.ones(1, 1, 1, dtype=torch.bool)
        seen_BQK = seen_BQK.expand(rows, width, known_BK.shape[1])
        code_BQ = torch.zeros(rows, width, dtype=torch.int64)
        for place in range(self.length):
            here_BQK = (key_positions_BK == place + 1)[:, None] & seen_BQK
            token_BQ = torch.where(here_BQK, known_BK[:, None], self.mask_token_id).amin(-1)  # the mask is the largest id
            code_BQ = code_BQ * (self.vocab_size + 1) + token_BQ
        # in_place: a mask is read for itself; clean text predicts its next token under either alignment.
        own_BQ = (tokens_BQ == self.mask_token_id) & (self.alignment == "in_place")
        predicted_BQ = (positions_BQ - own_BQ.long()).clamp(0, self.length - 1)
        logits_BQV = self.table[code_BQ, predicted_BQ]
        if kept.dtype == torch.bool:
            return logits_BQV[kept]
        return logits_BQV.gather(1, kept[..., None].expand(-1, -1, logits_BQV.shape[2]))
