"""The table of published methods: a row names its choice on each of the four axes. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PublishedMethod:
    """One row.

    choices: values of the recipe's `method` section. departs: where we differ from the paper, and why. unverified: what the paper
    or its code leaves open, so that the row is our reading.
    """

    name: str
    paper: str
    summary: str
    choices: dict[str, Any] = field(default_factory=dict)
    departs: str = ""
    unverified: str = ""


METHODS = {
    row.name: row
    for row in (
        PublishedMethod(
            name="diffullama",
            paper="arXiv 2410.17891",
            summary="bidirectional attention annealed from causal at random pairs, shift, uniform-t masking, 1/t",
            choices={
                "attention": {"pattern": "bidirectional", "anneal": "random", "anneal_steps": 10_000},
                "alignment": "shift",
                "corruption": {"kind": "masking", "eps": 1e-3, "noise_levels": "uniform"},
                "objective": {"weight": "elbo", "normaliser": "eligible"},
            },
            departs=(
                "The sum is divided once by the global count of eligible tokens; the paper's code divides each micro-batch by its "
                "masked tokens on top of the weight 1/t (objective.normaliser=masked_micro_batch), which depends on the micro-batch size."
            ),
        ),
        PublishedMethod(
            name="dream",
            paper="arXiv 2508.15487",
            summary="bidirectional attention at once, shift, masking at evenly spaced t, CART weights",
            choices={
                "attention": {"pattern": "bidirectional", "anneal": "none"},
                "alignment": "shift",
                "corruption": {"kind": "masking", "eps": 1e-3, "noise_levels": "offset"},
                "objective": {"weight": "cart", "cart_p": 0.1, "normaliser": "masked"},
            },
            departs=(
                "The sum is divided by the masked tokens of the global batch, the code's by those of each rank, which depends on the "
                "number of ranks. Only tokens of the same document count as clean context, and no padding does (the code counts both). "
                "Position 0 is never a target; the code scores it with its own hidden state."
            ),
            unverified=(
                "That attention is bidirectional from the first step; p of pretraining (0.1 is the shipped configuration of Dream-Coder, "
                "its function's default is 0.8); how t was spread over the batch in pretraining."
            ),
        ),
        PublishedMethod(
            name="llada",
            paper="arXiv 2502.09992",
            summary="bidirectional attention at once, in place, uniform-t masking, 1/t",
            choices={
                "attention": {"pattern": "bidirectional", "anneal": "none"},
                "alignment": "in_place",
                "corruption": {"kind": "masking", "eps": 1e-3, "noise_levels": "uniform"},
                "objective": {"weight": "elbo", "normaliser": "eligible"},
            },
            departs=(
                "The paper trains from random weights; here its objective starts from an AR checkpoint. One row in a hundred is cut to a "
                "random length there, none here (documents mixed in a row have all lengths, and LLaDA2.0 gained more from document masks). In fine-tuning "
                "the paper divides each row by its answer's length, which gives tokens of short answers more weight; here all tokens count alike."
            ),
        ),
        PublishedMethod(
            name="bd3lm",
            paper="arXiv 2503.09573",
            summary="block-causal attention on [noised | clean], in place, a noise level a block, 1/t",
            choices={
                "attention": {"pattern": "block_causal", "block_length": 16, "anneal": "none"},
                "alignment": "in_place",
                "corruption": {"kind": "masking", "eps": 1e-3, "noise_levels": "stratified", "levels_per": "block"},
                "objective": {"weight": "elbo", "normaliser": "eligible"},
            },
            departs=(
                "The paper trains from random weights; here its objective starts from an AR checkpoint. Levels cover [eps, 1]; the paper clips them "
                "to a band that it searches for each block length (method.corruption.band=[0.3,0.8] at 16, [0.5,1] at 4)."
            ),
        ),
        PublishedMethod(
            name="sdar",
            paper="arXiv 2510.06303",
            summary="block-causal attention, blocks of 4 at once, in place, masking, 1/t",
            choices={
                "attention": {"pattern": "block_causal", "block_length": 4, "anneal": "none"},
                "alignment": "in_place",
                "corruption": {"kind": "masking", "eps": 1e-3, "noise_levels": "uniform", "levels_per": "row", "count": "at_least_one"},
                "objective": {"weight": "elbo", "normaliser": "eligible"},
            },
            departs=(
                "The code draws one level a packed document, here it is one a row; it redraws until a mask exists and keeps 1/t, here the weight is "
                "corrected so that the sum stays the bound. Blocks of 8 to 64 are for the fine-tuning (method.attention.block_length)."
            ),
        ),
        PublishedMethod(
            name="fast-dllm-v2",
            paper="arXiv 2509.26328",
            summary="block-causal attention, blocks of 32, shift, complementary masks, unweighted",
            choices={
                "attention": {"pattern": "block_causal", "block_length": 32, "anneal": "none"},
                "alignment": "shift",
                "corruption": {"kind": "masking", "eps": 1e-3, "noise_levels": "uniform", "levels_per": "block", "views": "complementary"},
                "objective": {"weight": "unweighted", "normaliser": "masked"},
            },
            departs=(
                "The first token of a block is never masked and is predicted by the clean copy, weight 1, as it is in decoding; the code trains it from "
                "the noised copy and decodes it from the clean text. Rows are packed: the code pads each sample with masks without loss up to a block."
            ),
        ),
        PublishedMethod(
            name="efficient-dlm",
            paper="arXiv 2512.14067",
            summary="block-causal attention with clean context, in place, masks that fall late in the block",
            choices={
                "attention": {"pattern": "block_causal", "block_length": 16, "anneal": "none"},
                "alignment": "in_place",
                "corruption": {"kind": "masking", "eps": 1e-3, "noise_levels": "uniform", "levels_per": "block", "half_life": 0.1},
                "objective": {"weight": "unweighted", "normaliser": "masked"},
            },
            departs="Blocks of 16 are for 1.5B parameters, 64 for 4B and 8B (method.attention.block_length=64).",
            unverified="The weight of the masked cross-entropy: the paper's formula divides by the mask ratio, which is no bound here; unweighted is our reading.",
        ),
        PublishedMethod(
            name="nbdiff",
            paper="arXiv 2512.06776",
            summary="context-causal attention, blocks grow from 1 to 32, shift, AR loss on the clean copy",
            choices={
                "attention": {"pattern": "context_causal", "block_length": 32, "anneal": "block_growth", "anneal_steps": 0.625},
                "alignment": "shift",
                "corruption": {"kind": "masking", "eps": 1e-3, "noise_levels": "uniform", "levels_per": "block"},
                "objective": {"weight": "elbo", "normaliser": "eligible", "ar_weight": 0.5, "ar_schedule": "annealed"},
            },
            departs="First tokens of blocks are predicted by the clean copy, in training as in decoding. Blocks are at 32 after 0.625 of the steps: step 2,500 of the paper's 4,000.",
            unverified="The weight of the denoising loss (1/t is our reading) and the shape in which the weight of the AR loss falls (linear here).",
        ),
        PublishedMethod(
            name="nemotron",
            paper="Nemotron Labs Diffusion (NVIDIA; recipe in NeMo Automodel)",
            summary="context-causal attention, blocks of 32, in place, 0.3 x denoising + AR loss",
            choices={
                "attention": {"pattern": "context_causal", "block_length": 32, "anneal": "none"},
                "alignment": "in_place",
                "corruption": {"kind": "masking", "eps": 1e-3, "noise_levels": "stratified", "levels_per": "block"},
                "objective": {"weight": "elbo", "normaliser": "eligible", "ar_weight": 3.333},
            },
            departs="Written as denoising + 3.333 x AR, the recipe's 0.3 x denoising + AR but for a common factor: scale the learning rate by 0.3 to have its steps.",
            unverified="Known from the recipe and secondary text, no paper was read.",
        ),
        PublishedMethod(
            name="i-dlm",
            paper="arXiv 2604.11035",
            summary="causal inside blocks of 3, shift, everything masked, AR loss on the clean copy",
            choices={
                "attention": {"pattern": "causal_in_block", "block_length": 3, "anneal": "block_growth", "anneal_steps": 0.667},
                "alignment": "shift",
                "corruption": {"kind": "all_masked"},
                "objective": {"weight": "unweighted", "normaliser": "eligible", "ar_weight": 0.2},
            },
            departs=(
                "Blocks grow by doubling up to 3 (1, 2, 3: an epoch each in the paper). The code's labels are one place off at both ends of an answer; here the "
                "token that is predicted decides. First tokens of blocks are predicted by the clean copy. The paper balances both losses for blocks of 3 only: "
                "objective.ar_schedule=balanced with ar_weight=1 does so in a whole stage. With train.lora.gated=true there is no AR loss: the next-token path "
                "is the source's own, bit for bit, and the loss would have no gradient."
            ),
        ),
        PublishedMethod(
            name="tidar",
            paper="arXiv 2511.08923",
            summary="causal text, one bidirectional draft block of 8, all masked, AR loss with the same weight",
            choices={
                "attention": {"pattern": "context_causal", "block_length": 8, "anneal": "none"},
                "alignment": "in_place",
                "corruption": {"kind": "all_masked"},
                "objective": {"weight": "unweighted", "normaliser": "eligible", "ar_weight": 1.0},
            },
            departs="The sum of both losses, not their mean. All blocks of a row are drafted in one forward.",
            unverified="Known from the abstract and secondary text.",
        ),
        PublishedMethod(
            name="llada2",
            paper="arXiv 2512.15745",
            summary="block-causal attention; blocks grow to the row, stay, and shrink to 32; in place",
            choices={
                "attention": {"pattern": "block_causal", "block_length": 32, "anneal": "warm_up_stable_decay", "anneal_steps": 0.2, "decay_steps": 0.2},
                "alignment": "in_place",
                "corruption": {"kind": "masking", "eps": 1e-3, "noise_levels": "uniform", "levels_per": "block"},
                "objective": {"weight": "elbo", "normaliser": "eligible"},
            },
            departs="Noise on the embedding of a mask token that starts near 0 is method.corruption.embedding_noise (off: the row starts at the mean of all). The lengths of the three phases are fractions that a recipe sets; the paper gives the order of block lengths only. The confidence loss of its fine-tuning (CAP) is not built.",
        ),
        PublishedMethod(
            name="repr-align",
            paper="arXiv 2605.06885",
            summary="bidirectional attention at once, shift, masking, hidden states held near the frozen source's",
            choices={
                "attention": {"pattern": "bidirectional", "anneal": "none"},
                "alignment": "shift",
                "corruption": {"kind": "masking", "eps": 2e-3, "noise_levels": "uniform", "band": (0.002, 0.998)},
                "objective": {"weight": "unweighted", "normaliser": "masked", "alignment_weight": 10.0},
            },
            departs=(
                "The code's second loss on paths of denoising is left out. Freezing embeddings and head is a setting of the recipe, not of this row: "
                "train.rates={embeddings: 0, head: 0}. The frozen source lies in memory beside the model (2 bytes a parameter in bf16, 4 in fp32, without gradients or "
                "moments); under DeepSpeed it lies whole on each rank, and ZeRO-3 is refused."
            ),
            unverified="That the source reads the clean text from left to right while the model reads the noised one, and that layers and tokens are averaged evenly.",
        ),
        PublishedMethod(
            name="gidd",
            paper="arXiv 2503.04482",
            summary="bidirectional attention at once, in place, masks mixed with random tokens, loss on all tokens",
            choices={
                "attention": {"pattern": "bidirectional", "anneal": "none"},
                "alignment": "in_place",
                "corruption": {"kind": "gidd", "uniform_share": 0.1, "eps": 1e-4, "noise_levels": "offset"},
                "objective": {"weight": "gidd_dynamic", "normaliser": "eligible"},
            },
            departs=(
                "No time conditioning: an AR checkpoint has no place for t, although the posterior depends on it here (with masks alone it does not). The paper trains "
                "from random weights. The small weight of right tokens is the paper's formula, the released code has another. Validation and sampling mask only, as for "
                "every method: their bound is not the one that is trained."
            ),
        ),
        PublishedMethod(
            name="seed-edit",
            paper="arXiv 2508.02193",
            summary="bidirectional attention at once, shift, masking, 1/t; the last fifth of the steps also corrects edits",
            choices={
                "attention": {"pattern": "bidirectional", "anneal": "none"},
                "alignment": "shift",
                "corruption": {"kind": "masking", "eps": 1e-3, "noise_levels": "uniform", "edit_share": 0.1, "edit_steps": 0.2},
                "objective": {"weight": "elbo", "normaliser": "eligible"},
            },
            departs=(
                "Edits are substitutions by random tokens, which keep the length: the paper also inserts and deletes and does not say how places are matched afterwards. "
                "Each row draws its own share of edits, up to a tenth. A step of the last phase runs each micro-batch twice, noised and edited."
            ),
            unverified="Attention, alignment and the mix of operations of a closed model; a uniform share is our reading.",
        ),
        PublishedMethod(
            name="ar",
            paper="the baseline of every paper",
            summary="causal attention, next-token cross-entropy on the same rows",
            choices={
                "attention": {"pattern": "causal", "anneal": "none"},
                "alignment": "shift",
                "corruption": {"kind": "none"},
                "objective": {"weight": "unweighted", "normaliser": "eligible"},
            },
        ),
    )
}
