"""Codes of 4 bits that lie eight to a word of 32 bits, the first in the lowest bits: how checkpoints keep them."""

import torch

PER_WORD = 8


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, columns], 0 to 15 → int32 [rows, words]; what the last word has too many is 0."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % PER_WORD))
    octets: torch.Tensor = padded[:, 0::2] | padded[:, 1::2] << 4
    return octets.contiguous().view(torch.int32)  # little-endian


def turn_nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, words] → int32 [ceil(rows / 8), 8, words]: codes of a column lie in a word, not those of a row.

    Place r of [i, p, w] is place p of [8 i + r, w] before, 0 beyond the last row. Eight words of eight codes are
    turned by exchanging halves of halves, without taking them apart.
    """
    rows, count = words.shape
    turned = torch.zeros(-(-rows // PER_WORD), PER_WORD, count, dtype=torch.int32)
    turned.flatten(0, 1)[:rows] = words
    for step, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        pairs = turned.view(len(turned), 4 // step, 2, step, count)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        change = (first >> 4 * step ^ second) & mask
        second ^= change
        first ^= change << 4 * step
    return turned


def unpack_nibbles(words: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """int32 [rows, words] → uint8 [rows, columns], of all words by default."""
    # One row after the other, for what has one column may keep any stride.
    octets = words.contiguous().flatten().view(torch.uint8).view(len(words), 4 * words.shape[1])
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)[:, :columns].contiguous()
