"""Grouped-query attention of one layer on a GPU: heads are normed, turned and put into their pages by one launch."""

# The names of kernels' arguments are Triton's to type.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import torch
import triton
import triton.language as tl

from ..trunk_ops import PAGE, AttentionLayer
from .batch import DeviceBatch
from .pages import Cached, attend, pages_of, store_page
from .rows import ROWS

_PAGE = tl.constexpr(PAGE)
HEADS = 8  # that one program norms and turns


@triton.jit
def turned(
    source, norm, cos, sin, live, eps,
    NORM: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """f32 [rows, heads, BLOCK]: heads of DIM numbers, normed, their first ROTARY numbers turned.

    `source` points to each head's first number, [rows, heads, 1]; `cos` and `sin` to each row's, [rows, 1, 1].
    """
    at = tl.arange(0, BLOCK)[None, None, :]
    half: tl.constexpr = ROTARY // 2
    if INTERLEAVED:
        first = at % 2 == 0
        partner = at ^ 1
        angle = at // 2
    else:
        first = at < half
        partner = tl.where(first, at + half, at - half)
        angle = tl.where(first, at, at - half)
    turns = live & (at < ROTARY)
    x = tl.load(source + at, mask=live & (at < DIM), other=0.0)
    other = tl.load(source + partner, mask=turns, other=0.0)
    if NORM:
        factor = 1.0 / tl.sqrt(tl.sum(x * x, 2) / DIM + eps)[:, :, None]
        x *= factor * tl.load(norm + at, mask=at < DIM, other=0.0)
        other *= factor * tl.load(norm + partner, mask=at < ROTARY, other=0.0)
    c = tl.load(cos + angle, mask=turns, other=1.0)
    s = tl.load(sin + angle, mask=turns, other=0.0)
    return x * c + tl.where(first, -other, other) * s


@triton.jit(
    do_not_specialize=["base", "tokens", "table_row"],
    do_not_specialize_on_alignment=["sequences", "positions", "table"],
)
def _place_heads(
    base, rows, cos, sin, sequences, positions, table, query_norm, key_norm, queries,
    tokens, row_size, query_stride, keys_from, values_from, table_row, page_keys, page_values, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, QUERY_NORM: tl.constexpr, KEY_NORM: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    query_tiles: tl.constexpr = (HEADS + TILE - 1) // TILE
    key_tiles: tl.constexpr = (KV_HEADS + TILE - 1) // TILE
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    part = tl.program_id(1)
    at = tl.arange(0, BLOCK)[None, None, :]
    exists = row < tokens
    starts = rows + (row * row_size)[:, None, None]
    cos_rows = cos + (row * (ROTARY // 2))[:, None, None]
    sin_rows = sin + (row * (ROTARY // 2))[:, None, None]
    lane = tl.arange(0, TILE)[None, :, None]
    if part < query_tiles:
        q_head = part * TILE + lane
        q_live = exists[:, None, None] & (q_head < HEADS)
        q_at = starts + q_head * query_stride
        q = turned(q_at, query_norm, cos_rows, sin_rows, q_live, eps, QUERY_NORM, DIM, ROTARY, INTERLEAVED, BLOCK)
        tl.store(queries + (row[:, None, None] * HEADS + q_head) * DIM + at, q, mask=q_live & (at < DIM))
    else:
        page, position = pages_of(base, sequences, positions, table, row, exists, table_row)
        place = (position % _PAGE)[:, None, None]
        has_token = (position >= 0)[:, None, None]
        if part < query_tiles + key_tiles:
            k_head = (part - query_tiles) * TILE + lane
            k_live = has_token & (k_head < KV_HEADS)
            k_at = starts + keys_from + k_head * DIM
            k = turned(k_at, key_norm, cos_rows, sin_rows, k_live, eps, KEY_NORM, DIM, ROTARY, INTERLEAVED, BLOCK)
            k_to = (k_head * _PAGE + place) * DIM + at
            store_page((page + page_keys)[:, None, None], k_to, k, k_live & (at < DIM), HALF)
        else:
            v_head = (part - query_tiles - key_tiles) * TILE + lane
            v_live = has_token & (v_head < KV_HEADS) & (at < DIM)
            v = tl.load(starts + values_from + v_head * DIM + at, mask=v_live, other=0.0)
            v_to = (v_head * _PAGE + place) * DIM + at
            store_page((page + page_values)[:, None, None], v_to, v, v_live, HALF)


class GpuAttention:
    """Grouped-query attention of one layer; keeps its small weights on the device."""

    def __init__(self, layer: AttentionLayer, group: int, device: torch.device) -> None:
        """`group`: of layers, whose pages hold this layer's part of the cache."""
        self._layer = layer
        self._group = group
        self._query_norm, self._key_norm, self._sinks = (
            None if tensor is None else tensor.to(device)
            for tensor in (layer.query_norm, layer.key_norm, layer.sinks)
        )
        self._cached = Cached(
            heads=layer.heads,
            kv_heads=layer.kv_heads,
            key=layer.head_dim,
            rest=0,
            value=layer.head_dim,
            shared=False,
            half=layer.dtype == torch.bfloat16,
            keys_at=layer.page_at,
            values_at=layer.page_at + layer.keys_bytes,
            window=layer.window,
            scale=layer.scale,
        )

    def __call__(self, rows: torch.Tensor, batch: DeviceBatch) -> torch.Tensor:
        """`rows` f32 [T, layer.row] → f32 [T, heads * head_dim]; their keys and values went to the pages before."""
        layer, table = self._layer, batch.tables[self._group]
        heads, dim = layer.heads, layer.head_dim
        stride = dim * (2 if layer.gated else 1)
        queries = torch.empty(len(rows), heads, dim, device=rows.device)
        tile = min(HEADS, triton.next_power_of_2(heads))
        tiles = -(-heads // tile) + 2 * -(-layer.kv_heads // tile)
        _place_heads[-(-len(rows) // ROWS), tiles](
            batch.base, rows, batch.cos, batch.sin, batch.sequences, batch.positions, table,
            rows if self._query_norm is None else self._query_norm,
            rows if self._key_norm is None else self._key_norm,
            queries, len(rows), rows.stride(0), stride, heads * stride, heads * stride + layer.kv_heads * dim,
            table.stride(0),
            self._cached.keys_at, self._cached.values_at, layer.eps,
            HEADS=heads, KV_HEADS=layer.kv_heads, DIM=dim, ROTARY=layer.rotary, INTERLEAVED=layer.interleaved,
            QUERY_NORM=self._query_norm is not None, KEY_NORM=self._key_norm is not None, HALF=self._cached.half,
            ROWS=ROWS, TILE=tile, BLOCK=triton.next_power_of_2(dim),
        )  # fmt: skip
        gates = rows[:, : heads * stride].unflatten(1, (heads, stride))[:, :, dim:] if layer.gated else None
        out = torch.empty(len(rows), heads, dim, device=rows.device)
        attend(self._cached, self._group, queries, batch, self._sinks, gates, out)
        return out.flatten(1)
