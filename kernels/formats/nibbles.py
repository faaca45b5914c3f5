"""Codes of 4 bits that lie eight to a word of 32 bits, the first in the lowest bits: how checkpoints keep them."""

import torch

PER_WORD = 8


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, columns], 0 to 15 → int32 [rows, words]; what the last word has too many is 0."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % PER_WORD))
    octets: torch.Tensor = padded[:, 0::2] | padded[:, 1::2] << 4
    return octets.contiguous().view(torch.int32)  # little-endian


def unpack_nibbles(words: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """int32 [rows, words] → uint8 [rows, columns], of all words by default."""
    octets = words.contiguous().view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)[:, :columns].contiguous()
