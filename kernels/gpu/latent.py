"""Multi-head latent attention on a GPU, in the absorbed form: what is between the projections.

Queries are multiplied with the keys' half of kv_b_proj, so that they meet the cached latents as they are; what comes
out of the attention is a latent again, which the values' half turns into values. A page's part of a layer holds a
latent and a rotary key for each of its tokens.
"""

# The names of kernels' arguments are Triton's to type.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import torch
import triton
import triton.language as tl

from ..mla import MlaLayer
from ..trunk_ops import PAGE
from .attention import HEADS, turned
from .batch import DeviceBatch
from .pages import Cached, attend, pages_of, store_page
from .rows import ROWS

_PAGE = tl.constexpr(PAGE)


@triton.jit(
    do_not_specialize=["base", "tokens", "table_row"],
    do_not_specialize_on_alignment=["sequences", "positions", "table"],
)
def _place_latents(
    base, queries, compressed, cos, sin, sequences, positions, table, norm, absorbed,
    tokens, query_row, compressed_row, table_row, page_at, eps,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, RANK: tl.constexpr, INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_ROPE: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (HEADS + TILE - 1) // TILE
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    part = tl.program_id(1)
    exists = row < tokens
    at = tl.arange(0, BLOCK_ROPE)[None, None, :]
    cos_rows = cos + (row * (ROPE // 2))[:, None, None]
    sin_rows = sin + (row * (ROPE // 2))[:, None, None]
    if part < tiles:
        head = (part * TILE + tl.arange(0, TILE))[None, :, None]
        q_live = exists[:, None, None] & (head < HEADS)
        q_at = queries + (row * query_row)[:, None, None] + head * (NOPE + ROPE) + NOPE
        q = turned(q_at, norm, cos_rows, sin_rows, q_live, eps, False, ROPE, ROPE, INTERLEAVED, BLOCK_ROPE)
        q_to = absorbed + (row[:, None, None] * HEADS + head) * (RANK + ROPE) + RANK + at
        tl.store(q_to, q, mask=q_live & (at < ROPE))
    else:
        page, position = pages_of(base, sequences, positions, table, row, exists, table_row)
        to = (page + page_at)[:, None, None]
        place = (position % _PAGE * (RANK + ROPE))[:, None, None]
        live = (position >= 0)[:, None, None]
        source = compressed + (row * compressed_row)[:, None, None]
        lanes = tl.arange(0, BLOCK_RANK)[None, None, :]
        x = tl.load(source + lanes, mask=live & (lanes < RANK), other=0.0)
        x = x / tl.sqrt(tl.sum(x * x, 2) / RANK + eps)[:, :, None]
        x *= tl.load(norm + lanes, mask=lanes < RANK, other=0.0)
        store_page(to, place + lanes, x, live & (lanes < RANK), HALF)
        y = turned(source + RANK, norm, cos_rows, sin_rows, live, eps, False, ROPE, ROPE, INTERLEAVED, BLOCK_ROPE)
        store_page(to, place + RANK + at, y, live & (at < ROPE), HALF)


class GpuLatentAttention:
    """One layer; keeps kv_b_proj and the latents' norm on the device."""

    def __init__(self, layer: MlaLayer, group: int, device: torch.device) -> None:
        """`group`: of layers, whose pages hold this layer's part of the cache."""
        self._layer = layer
        self._group = group
        self._norm = layer.norm.to(device)
        up = layer.up.to(device).view(layer.heads, layer.nope + layer.value, layer.rank)
        self._keys, self._values = up[:, : layer.nope], up[:, layer.nope :].transpose(1, 2)
        self._cached = Cached(
            heads=layer.heads,
            kv_heads=1,
            key=layer.rank,
            rest=layer.rope,
            value=layer.rank,
            shared=True,
            half=layer.dtype == torch.bfloat16,
            keys_at=layer.page_at,
            values_at=layer.page_at,
            window=None,
            scale=layer.scale,
        )

    def __call__(self, queries: torch.Tensor, compressed: torch.Tensor, batch: DeviceBatch) -> torch.Tensor:
        """f32 [T, heads * value], after the tokens' latents went to the pages.

        `queries` f32 [T, heads * (nope + rope)]; `compressed` f32 [T, rank + rope], strided, not normed or turned.
        """
        layer, table, tokens = self._layer, batch.tables[self._group], len(queries)
        by_head = queries.view(tokens, layer.heads, -1)[:, :, : layer.nope].transpose(0, 1)
        absorbed = torch.empty(tokens, layer.heads, layer.rank + layer.rope, device=queries.device)
        absorbed[:, :, : layer.rank].copy_(torch.bmm(by_head.to(self._keys.dtype), self._keys).transpose(0, 1))
        tile = min(HEADS, triton.next_power_of_2(layer.heads))
        _place_latents[-(-tokens // ROWS), -(-layer.heads // tile) + 1](
            batch.base, queries, compressed, batch.cos, batch.sin, batch.sequences, batch.positions, table,
            self._norm, absorbed, tokens, queries.stride(0), compressed.stride(0), table.stride(0), layer.page_at,
            layer.norm_eps,
            HEADS=layer.heads, NOPE=layer.nope, ROPE=layer.rope, RANK=layer.rank, INTERLEAVED=layer.interleaved,
            HALF=self._cached.half, ROWS=ROWS, TILE=tile, BLOCK_ROPE=triton.next_power_of_2(layer.rope),
            BLOCK_RANK=triton.next_power_of_2(layer.rank),
        )  # fmt: skip
        latents = torch.empty(tokens, layer.heads, layer.rank, device=queries.device)
        attend(self._cached, self._group, absorbed, batch, None, None, latents)
        values = torch.bmm(latents.transpose(0, 1).to(self._values.dtype), self._values)  # [heads, T, value]
        return values.transpose(0, 1).flatten(1).float()
