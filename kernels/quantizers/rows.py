"""Codes and scales as a GGUF file's block rows (ggml-common.h), the same bytes that llama.cpp would read."""

import torch

from .grids import Fit


def block_bytes(name: str, codes: torch.Tensor, fit: Fit) -> torch.Tensor:
    """`codes` uint8 [rows, columns of a block] → uint8 [rows, bytes of a block]."""
    rows = len(codes)
    d = _half(fit.d)
    if name == "q8_0":
        return torch.cat([d, codes ^ 128], 1)  # code - 128 as two's complement
    if name == "iq4_nl":
        return torch.cat([d, codes[:, :16] | codes[:, 16:] << 4], 1)
    scales = fit.scales
    if name == "q2_k":
        assert fit.m is not None and fit.minimums is not None
        both = (scales | fit.minimums << 4).to(torch.uint8)
        return torch.cat([both, _planes(codes, 2), d, _half(fit.m)], 1)
    if name == "q3_k":
        coded = (scales + 32).to(torch.uint8)
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
                scales.to(torch.int8).view(torch.uint8),
                d,
            ],
            1,
        )
    if name == "iq4_xs":
        coded = scales + 32
        upper = _stack((coded >> 4).view(rows, 2, 4).transpose(1, 2), 2)
        low = (coded & 15).to(torch.uint8)
        halves = codes.view(rows, 8, 2, 16)
        return torch.cat(
            [
                d,
                upper.to(torch.uint8),
                low[:, 0::2] | low[:, 1::2] << 4,
                (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1),
            ],
            1,
        )
    assert name in ("q4_k", "q5_k") and fit.m is not None and fit.minimums is not None
    s, m = scales.to(torch.uint8), fit.minimums.to(torch.uint8)
    packed = [
        s[:, :4] | s[:, 4:] >> 4 << 6,
        m[:, :4] | m[:, 4:] >> 4 << 6,
        s[:, 4:] & 15 | (m[:, 4:] & 15) << 4,
    ]
    pairs = (codes & 15).view(rows, 4, 2, 32)
    low = (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)
    fifth = [_stack((codes >> 4).view(rows, 8, 32), 1)] if name == "q5_k" else []
    return torch.cat([d, _half(fit.m), *packed, *fifth, low], 1)


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
