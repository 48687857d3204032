"""GIDD: masks and uniformly random tokens in one corruption, so that a model learns which visible tokens are wrong (arXiv 2503.04482).

    q_t(. | x) = ((1 - t) x + t e_M + c_t u) / (1 + c_t),   c_t = B sqrt(t (1 - t)),   B = 2 p_u / (1 - p_u)

u is uniform over the N tokens of text, M the mask token; the share of random tokens is largest, p_u, at t = 1/2. With x_theta the model's
prediction (M left out of its softmax) and r = q_t(z | x) / q_t(z | x_theta) for the token z that is seen,

    NELBO = E_t sum_i w_t(z_i, x_i) [KL(q_t(. | x_i) || q_t(. | x_theta)) + r - log r - 1] + const

over all positions, masked or not. p_u -> 0 is masking with the weight 1/t.

Shapes: B rows, L tokens a row, N targets (all eligible positions), C targets of a chunk, V rows of the output matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST_WEIGHT = 2.0
"""Of the clamped and the dynamic weights, as in the released configuration (the paper writes 1)."""


@dataclass(frozen=True)
class Mixture:
    """uniform_share: p_u in (0, 1). num_tokens: N, the tokens of text."""

    uniform_share: float
    num_tokens: int

    @property
    def scale(self) -> float:
        """B."""
        return 2 * self.uniform_share / (1 - self.uniform_share)

    def uniform_ratio(self, t: torch.Tensor) -> torch.Tensor:
        """c_t."""
        return self.scale * (t * (1 - t)).sqrt()

    def masses(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(kept, masked, uniform): alpha_t = (1 - t) / (1 + c_t), t / (1 + c_t), c_t / (1 + c_t); they sum to 1."""
        c = self.uniform_ratio(t)
        return (1 - t) / (1 + c), t / (1 + c), c / (1 + c)


def draw_tokens(
    x_0_BL: torch.Tensor, eligible_BL: torch.Tensor, t_BL: torch.Tensor, u_BL: torch.Tensor, v_BL: torch.Tensor, mixture: Mixture, mask_token_id: int
) -> torch.Tensor:
    """x_t_BL ~ q_t(. | x_0) where eligible, x_0 elsewhere. u_BL, v_BL: uniform draws in [0, 1), of what happens and of the random token."""
    kept_BL, masked_BL, _ = mixture.masses(t_BL)
    x_t_BL = torch.where(u_BL < kept_BL + masked_BL, torch.full_like(x_0_BL, mask_token_id), random_tokens(v_BL, mixture.num_tokens, mask_token_id))
    return torch.where(eligible_BL & (u_BL >= kept_BL), x_t_BL, x_0_BL)


def random_tokens(v: torch.Tensor, num_tokens: int, mask_token_id: int) -> torch.Tensor:
    """int64: one of the N tokens of text for each uniform draw in [0, 1). A mask token that stands among them is stepped over."""
    ids = (v * num_tokens).long().clamp(max=num_tokens - 1)
    return ids + (ids >= mask_token_id).long()


def elbo_weights(x_t_N: torch.Tensor, x_0_N: torch.Tensor, t_N: torch.Tensor, mixture: Mixture, mask_token_id: int) -> torch.Tensor:
    """w_t(z, x): 1 / (t (1 - t)) for a mask, half of it for a random token, that times c_t / (N (1 - t) + c_t) for a token that is right."""
    masked_N = 1 / (t_N * (1 - t_N))
    c_N = mixture.uniform_ratio(t_N)
    kept_N = masked_N / 2 * c_N / (mixture.num_tokens * (1 - t_N) + c_N)
    return torch.where(x_t_N == mask_token_id, masked_N, torch.where(x_t_N == x_0_N, kept_N, masked_N / 2))


def training_weights(
    x_t_N: torch.Tensor, x_0_N: torch.Tensor, t_N: torch.Tensor, mixture: Mixture, mask_token_id: int, weight: str
) -> torch.Tensor:
    """`elbo`: as above, which explodes at both ends. `gidd_clamped`: that, at most 2. `gidd_dynamic`: 2 for a mask, 1 for a random token,
    B / (N + 1) sqrt(t / (1 - t)) for one that is right, at most 2.

    Released code has exp(sigmoid(-t) / 2) where the paper's formula has exp(-log-SNR / 2) = sqrt(t / (1 - t)); here it is the formula.
    """
    if weight == "gidd_dynamic":
        kept_N = mixture.scale / (mixture.num_tokens + 1) * (t_N / (1 - t_N)).sqrt()
        weights_N = torch.where(x_t_N == mask_token_id, 2.0, torch.where(x_t_N == x_0_N, kept_N, 1.0))
        return weights_N.clamp(max=LARGEST_WEIGHT)
    weights_N = elbo_weights(x_t_N, x_0_N, t_N, mixture, mask_token_id)
    assert weight in ("elbo", "gidd_clamped"), weight
    return weights_N if weight == "elbo" else weights_N.clamp(max=LARGEST_WEIGHT)


def divergences(
    logits_CV: torch.Tensor, x_0_C: torch.Tensor, x_t_C: torch.Tensor, t_C: torch.Tensor, mixture: Mixture, mask_token_id: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(KL_C, IS_C, CE_C): KL(q_t(. | x) || q_t(. | x_theta)), r - log r - 1, and -log x_theta(x), in nats; differentiable.

    The mask token and rows behind the `vocab_size` tokens of text have no part in x_theta.
    """
    ids_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    log_p_CV = torch.log_softmax(logits_CV.masked_fill((ids_V >= vocab_size) | (ids_V == mask_token_id), -torch.inf), dim=1)
    kept_C, _, uniform_C = mixture.masses(t_C)
    base_C = uniform_C / mixture.num_tokens  # q_t(v | x) of a token v that is neither x nor M
    p_x_C = log_p_CV.gather(1, x_0_C[:, None])[:, 0].exp()
    # sum over v of log(q_t(v | x_theta) / base), of which v = x is taken out; banned v add log 1.
    ratios_CV = torch.log1p(log_p_CV.exp() * (kept_C / base_C)[:, None])
    ratio_x_C = torch.log1p(p_x_C * kept_C / base_C)
    kl_C = (kept_C + base_C) * (torch.log1p(kept_C / base_C) - ratio_x_C) - base_C * (ratios_CV.sum(1) - ratio_x_C)
    seen_C = torch.where(x_t_C == mask_token_id, x_0_C, x_t_C)  # any token of text: a mask has r = 1 whatever is predicted
    is_right_C = (x_t_C == x_0_C).to(kept_C.dtype)
    log_r_C = torch.log1p(is_right_C * kept_C / base_C) - ratios_CV.gather(1, seen_C[:, None])[:, 0]
    log_r_C = torch.where(x_t_C == mask_token_id, 0.0, log_r_C)
    return kl_C, log_r_C.exp() - log_r_C - 1, -log_p_CV.gather(1, x_0_C[:, None])[:, 0]
