"""Dropout whose random numbers are a function of a seed and of the place in memory, in readable PyTorch.

Places are numbered as a dense tensor lies in memory. Those from 64 k on take the four words of 16 counters: place
64 k + 16 j + l takes word j of ``philox(16 k + l)``. The place is dropped where its word lies below p · 2³².

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), Philox4x32-10.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 16
_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox(counter: Tensor, seed: Tensor) -> list[Tensor]:
    """The four words of each 64-bit counter under a 64-bit seed; words are int64 in [0, 2³²)."""
    zero = torch.zeros_like(counter)
    words = [counter & _WORD, _high(counter), zero, zero]
    key = [seed & _WORD, _high(seed)]
    for _ in range(_ROUNDS):
        first, second = (word * multiplier for word, multiplier in zip(words[::2], _MULTIPLIERS, strict=True))
        words = [_high(second) ^ words[1] ^ key[0], second & _WORD, _high(first) ^ words[3] ^ key[1], first & _WORD]
        key = [(k + step) & _WORD for k, step in zip(key, _KEY_STEPS, strict=True)]
    return words


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """See ``fused_dropout``; ``seed``: int64, ``[1]``."""
    kept = torch.empty_like(x, dtype=torch.bool)
    blocks = -(-x.numel() // (4 * LANES))
    counter = torch.arange(blocks * LANES, device=x.device).view(blocks, LANES)
    words = torch.stack(philox(counter, seed), 1).flatten()[: x.numel()]
    kept.as_strided([x.numel()], [1]).copy_(words >= threshold(p))  # it is dense, whatever the order of dimensions
    return torch.where(kept, x * factor(p), 0)


def threshold(p: float) -> int:
    """Words below it drop their place."""
    return round(p * 2**32)


def factor(p: float) -> float:
    """What the places that are kept are multiplied by."""
    return 1 / (1 - p) if p < 1 else 0.0


def _high(product: Tensor) -> Tensor:
    """The upper 32 bits of 64, whose sign bit is a bit like others."""
    return (product >> 32) & _WORD
