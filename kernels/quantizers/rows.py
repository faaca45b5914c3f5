"""Codes and scales as a GGUF file's block rows (ggml-common.h), the same bytes that llama.cpp would read."""

from typing import NamedTuple

import torch


class Factors(NamedTuple):
    """Of some blocks: what their numbers are codes of. `m` and `minimums` mean nothing in formats without minimums.

    `d` and `m` f16 [blocks]; `scales` int8 and `minimums` uint8 [blocks, sub-blocks], without d and m.
    """

    d: torch.Tensor
    scales: torch.Tensor
    m: torch.Tensor
    minimums: torch.Tensor


def block_bytes(name: str, codes: torch.Tensor, factors: Factors) -> torch.Tensor:
    """`codes` uint8 [blocks, columns of a block] → uint8 [blocks, bytes of a block]."""
    rows = len(codes)
    d = _half(factors.d)
    if name == "q8_0":
        return torch.cat([d, codes ^ 128], 1)  # code - 128 as two's complement
    if name == "iq4_nl":
        return torch.cat([d, codes[:, :16] | codes[:, 16:] << 4], 1)
    scales = factors.scales
    if name == "q2_k":
        both = scales.view(torch.uint8) | factors.minimums << 4
        return torch.cat([both, _planes(codes, 2), d, _half(factors.m)], 1)
    if name == "q3_k":
        coded = (scales + 32).view(torch.uint8)
        low, high = coded & 15, coded >> 4
        packed = [low[:, :8] | low[:, 8:] << 4, _stack(high.view(rows, 4, 4), 2)]
        above = _stack((codes >> 2).view(rows, 8, 32), 1)
        return torch.cat([above, _planes(codes & 3, 2), *packed, d], 1)
    if name == "q6_k":
        low = (codes & 15).view(rows, 2, 2, 64)
        return torch.cat(
            [
                (low[:, :, 0] | low[:, :, 1] << 4).flatten(1),
                _planes(codes >> 4, 2),
                scales.view(torch.uint8),
                d,
            ],
            1,
        )
    if name == "iq4_xs":
        coded = (scales + 32).view(torch.uint8)
        upper = _stack((coded >> 4).view(rows, 2, 4).transpose(1, 2), 2)
        low = coded & 15
        halves = codes.view(rows, 8, 2, 16)
        return torch.cat(
            [
                d,
                upper,
                low[:, 0::2] | low[:, 1::2] << 4,
                (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1),
            ],
            1,
        )
    assert name in ("q4_k", "q5_k")
    s, m = scales.view(torch.uint8), factors.minimums
    packed = [
        s[:, :4] | s[:, 4:] >> 4 << 6,
        m[:, :4] | m[:, 4:] >> 4 << 6,
        s[:, 4:] & 15 | (m[:, 4:] & 15) << 4,
    ]
    pairs = (codes & 15).view(rows, 4, 2, 32)
    low = (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)
    fifth = [_stack((codes >> 4).view(rows, 8, 32), 1)] if name == "q5_k" else []
    return torch.cat([d, _half(factors.m), *packed, *fifth, low], 1)


def _half(factors: torch.Tensor) -> torch.Tensor:
    return factors.contiguous().view(torch.uint8).view(-1, 2)


def _stack(parts: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, n, width] of `bits` each → [rows, width], the first part lowest."""
    joined = parts[:, 0].clone()
    for number in range(1, parts.shape[1]):
        joined |= parts[:, number] << bits * number
    return joined


def _planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """256 codes of 2 bits: of each half, four runs of 32 share 32 bytes."""
    return torch.cat(
        [_stack(half.reshape(len(codes), 4, 32), bits) for half in codes.view(len(codes), 2, 128).unbind(1)], 1
    )
