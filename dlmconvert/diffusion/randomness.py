"""Counter-based random numbers: the draw for a key is a pure function of the key.

Every draw of the project (noise levels, masks, attention pairs, samples) is keyed by what it is for, for example
(seed, epoch, row, position). So it does not depend on the number of processes, on the order of the draws, on the device, or
on where a run was interrupted, and no generator state has to be saved.

The mixer is the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), applied once a key: 64-bit integers, wrapping
multiplication, the same bits on every device.
"""

from __future__ import annotations

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_ONES = 0xFFFFFFFFFFFFFFFF

# What a draw is for. The first key of every stream, so that two uses of one (seed, step) never share draws.
NOISE_LEVEL, MASK, ATTENTION_PAIR, ROW_ORDER, SAMPLE_TOKEN, SAMPLE_ORDER, LIKELIHOOD, SOURCE_CHOICE = range(1, 9)
RANDOM_TOKEN, EDIT, EMBEDDING_NOISE = range(20, 23)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    # torch shifts signed integers arithmetically; the mixer needs zeros from the left.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _mix_integer(x: int) -> int:
    """`_mix(x + golden)` of a Python integer, as a signed 64-bit one."""
    x = (x + _GOLDEN) & _ONES
    x = ((x ^ (x >> 30)) * _MIX_1) & _ONES
    x = ((x ^ (x >> 27)) * _MIX_2) & _ONES
    return _signed(x ^ (x >> 31))


def counter_hash(*keys: int | torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """64 random bits (int64) for each element of the broadcast keys.

    keys: integers or integer tensors that broadcast against each other.
    device: where the result is put when no key is a tensor.

    Integers are mixed as integers: a FlexAttention predicate may not make tensors of its own.
    """
    state: int | torch.Tensor = 0
    for key in keys:
        if isinstance(key, torch.Tensor):
            state = _mix((key.to(torch.int64) ^ state) + _GOLDEN)
        elif isinstance(state, torch.Tensor):
            state = _mix((state ^ _signed(key)) + _GOLDEN)
        else:
            state = _mix_integer(state ^ key)
    return state if isinstance(state, torch.Tensor) else torch.tensor(state, dtype=torch.int64, device=device)


def counter_uniform(*keys: int | torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """Uniform draws in [0, 1) with 53 bits (float64; float32 with 24 bits where the device has no float64).

    A draw of exactly 0 has probability 2^-53; whoever takes a logarithm adds half a bit first.
    """
    bits = counter_hash(*keys, device=device)
    if bits.device.type == "mps":
        return _shift_right(bits, 40).to(torch.float32) * 2.0**-24
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def counter_gumbel(*keys: int | torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """Standard Gumbel draws, -log(-log u), in double precision.

    float32 noise truncates the tail and acts like a lower temperature (arXiv 2409.02908).
    """
    u = counter_uniform(*keys, device=device)
    half_bit = 2.0**-25 if u.dtype == torch.float32 else 2.0**-54
    return -torch.log(-torch.log(u + half_bit))


def counter_normal(*keys: int | torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
    """Standard normal draws (Box and Muller 1958), in double precision."""
    u, v = counter_uniform(*keys, 0, device=device), counter_uniform(*keys, 1, device=device)
    half_bit = 2.0**-25 if u.dtype == torch.float32 else 2.0**-54
    return (-2 * torch.log(u + half_bit)).sqrt() * torch.cos(2 * torch.pi * v)


def permutation(num_items: int, *keys: int) -> torch.Tensor:
    """A permutation of range(num_items), int64, keyed like every other draw."""
    seed = int(_shift_right(counter_hash(ROW_ORDER, *keys), 1))
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randperm(num_items, generator=generator)


def _signed(key: int) -> int:
    key = int(key) & _ONES
    return key - (1 << 64) if key >= 1 << 63 else key
