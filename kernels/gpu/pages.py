"""Softmax attention over a paged cache on a GPU: Triton kernels for single tokens, torch for long passes.

A page's part of a layer holds keys, then values, each [kv_heads, PAGE, numbers of a head]. For a few tokens each is
by itself: its keys are cut into `SPLITS` runs of pages so that one sequence fills the GPU, and the parts are put
together by a second launch. Whole sequences take torch's products, some keys at a time, which bounds the memory.
Latent attention is the same with one head of keys, whose first numbers are the values (latent.py).
"""

# The names of kernels' arguments are Triton's to type.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..trunk_ops import PAGE
from .batch import DeviceBatch, Rows
from .grouped import INTERPRETED
from .rows import sigmoid

_NOTHING = tl.constexpr(-1.0e30)  # less than any score; its differences are numbers
_PAGE = tl.constexpr(PAGE)
# Programs that a launch should have, at least: some two for each multiprocessor of a large GPU.
_PROGRAMS = 1 if triton.knobs.runtime.interpret else 256
_MAX_SPLITS = 32
_TILE = 16  # query heads of one program; tensor cores take no fewer rows
_KEYS_AT_ONCE = 512  # of a long pass


@triton.jit
def load_page(place, at, mask, HALF: tl.constexpr):
    """f32 numbers `at` some places after where bytes begin that hold f32 or bf16 ones."""
    if HALF:
        return tl.load(place.to(tl.pointer_type(tl.bfloat16)) + at, mask=mask, other=0.0).to(tl.float32)
    return tl.load(place.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)


@triton.jit
def store_page(place, at, numbers, mask, HALF: tl.constexpr):
    """Writes what `load_page` reads."""
    if HALF:
        tl.store(place.to(tl.pointer_type(tl.bfloat16)) + at, numbers.to(tl.bfloat16), mask=mask)
    else:
        tl.store(place.to(tl.pointer_type(tl.float32)) + at, numbers, mask=mask)


@triton.jit
def pages_of(base, sequences, positions, table, row, live, table_row):
    """Of each row: where the page begins that its token lies in, and its position, -1 if it has no token."""
    position = tl.load(positions + row, mask=live, other=-1)
    sequence = tl.load(sequences + row, mask=live, other=0)
    return base + tl.load(table + sequence * table_row + position // _PAGE, mask=position >= 0, other=0), position


@triton.jit
def _dot(a, b, HALF: tl.constexpr):
    if HALF:
        if INTERPRETED:  # its bf16 products are wrong
            return tl.dot(a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32), input_precision="ieee")
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    return tl.dot(a, b, input_precision="ieee")


@triton.jit(
    do_not_specialize=["base", "table_row"], do_not_specialize_on_alignment=["sequences", "positions", "table"]
)
def _attend(
    base, queries, sequences, positions, table, sums, stats, table_row, page_keys, page_values, window, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr,
    SHARED: tl.constexpr, WINDOW: tl.constexpr, HALF: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    group: tl.constexpr = HEADS // KV_HEADS
    tiles: tl.constexpr = (group + TILE - 1) // TILE
    row: tl.constexpr = DIM + REST
    token = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1) // tiles
    member = tl.program_id(1) % tiles * TILE + tl.arange(0, TILE)
    split = tl.program_id(2)
    position = tl.load(positions + token)
    first = position * 0
    if WINDOW:
        first = tl.maximum(position - window + 1, 0)
    pages = tl.where(position >= 0, position // _PAGE - first // _PAGE + 1, 0)
    each = (pages + SPLITS - 1) // SPLITS
    begin = first // _PAGE + split * each
    end = tl.minimum(begin + each, first // _PAGE + pages)
    addresses = table + tl.load(sequences + token) * table_row

    head = token * HEADS + kv * group + member
    heads_live = (member < group)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    v = tl.arange(0, BLOCK_V)[None, :]
    lanes = tl.arange(0, _PAGE)
    q = tl.load(queries + head[:, None] * row + d, mask=heads_live & (d < DIM), other=0.0)
    if REST > 0:
        r = tl.arange(0, BLOCK_R)[None, :]
        q_rest = tl.load(queries + head[:, None] * row + DIM + r, mask=heads_live & (r < REST), other=0.0)
    top = tl.full((TILE,), _NOTHING, dtype=tl.float32)
    total = tl.zeros((TILE,), dtype=tl.float32)
    sum = tl.zeros((TILE, BLOCK_V), dtype=tl.float32)
    for page in range(begin, end):
        start = tl.multiple_of(base + tl.load(addresses + page), 64)
        where = page * _PAGE + lanes
        seen = (where >= first) & (where <= position)
        at = ((kv * _PAGE + lanes) * row)[:, None]
        keys = load_page(start + page_keys, at + d, seen[:, None] & (d < DIM), HALF)
        scores = _dot(q, tl.trans(keys), HALF)
        if REST > 0:
            keys_rest = load_page(start + page_keys, at + DIM + r, seen[:, None] & (r < REST), HALF)
            scores += _dot(q_rest, tl.trans(keys_rest), HALF)
        if SHARED:
            values = keys
        else:
            at = ((kv * _PAGE + lanes) * VALUE)[:, None]
            values = load_page(start + page_values, at + v, seen[:, None] & (v < VALUE), HALF)
        scores = tl.where(seen[None, :], scores * scale, _NOTHING)
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.where(seen[None, :], tl.exp(scores - higher[:, None]), 0.0)
        kept = tl.exp(top - higher)
        total = total * kept + tl.sum(p, 1)
        sum = sum * kept[:, None] + _dot(p, values, HALF)
        top = higher
    place = head * SPLITS + split
    tl.store(stats + 2 * place, top, mask=member < group)
    tl.store(stats + 2 * place + 1, total, mask=member < group)
    tl.store(sums + place[:, None] * VALUE + v, sum, mask=heads_live & (v < VALUE))


@triton.jit
def _put_together(
    sums, stats, sinks, gates, out, gate_row, gate_stride,
    HEADS: tl.constexpr, VALUE: tl.constexpr, SPLITS: tl.constexpr, SINKS: tl.constexpr, GATED: tl.constexpr,
    TILE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * TILE + tl.arange(0, TILE)
    exists = number < HEADS
    head = token * HEADS + number
    place = head[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    v = tl.arange(0, BLOCK_V)[None, :]
    live = exists[:, None] & (v < VALUE)
    tops = tl.load(stats + 2 * place, mask=exists[:, None], other=_NOTHING)
    top = tl.max(tops, 1)
    if SINKS:
        sink = tl.load(sinks + number, mask=exists, other=_NOTHING)
        top = tl.maximum(top, sink)
    factors = tl.exp(tops - top[:, None])
    total = tl.sum(factors * tl.load(stats + 2 * place + 1, mask=exists[:, None], other=0.0), 1)
    if SINKS:
        total += tl.exp(sink - top)
    parts = tl.load(sums + place[:, :, None] * VALUE + v[:, None, :], mask=live[:, None, :], other=0.0)
    y = tl.sum(factors[:, :, None] * parts, 1) / tl.where(total > 0.0, total, 1.0)[:, None]
    if GATED:
        at = gates + token * gate_row + number[:, None] * gate_stride + v
        y *= sigmoid(tl.load(at, mask=live, other=0.0))
    tl.store(out + head[:, None] * VALUE + v, y, mask=live)


@triton.jit(do_not_specialize=["base"], do_not_specialize_on_alignment=["table"])
def _copy_pages(base, table, out, part_at, words, BLOCK: tl.constexpr):
    page = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = (tl.multiple_of(base + tl.load(table + page), 64) + part_at).to(tl.pointer_type(tl.int32))
    tl.store(out + page * words + at, tl.load(source + at, mask=at < words, other=0), mask=at < words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cached:
    """How a layer's keys and values lie in its pages, and how queries look at them."""

    heads: int
    kv_heads: int
    key: int  # numbers of a key, without `rest`
    rest: int  # numbers of a key after those that may be its value: latent attention's rotary part
    value: int
    shared: bool  # a value is its key's first numbers
    half: bool  # bf16, else f32
    keys_at: int  # bytes from a page's start
    values_at: int
    window: int | None
    scale: float


def attend(
    cached: Cached,
    group: int,
    queries: torch.Tensor,
    batch: DeviceBatch,
    sinks: torch.Tensor | None,
    gates: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """`queries` f32 [T, heads, key + rest] over the pages of the layers' `group` → `out` [T, heads, value].

    `sinks` [heads]; `gates` [T, heads, value] before the sigmoid, strided.
    """
    if batch.whole is not None:
        for number, rows in enumerate(batch.whole):
            part = slice(rows.first, rows.first + rows.tokens)
            table = batch.tables[group][number]
            _attend_whole(cached, queries[part], batch.base, table, rows, sinks, out[part])
        if gates is not None:
            out.mul_(torch.sigmoid(gates))
        return
    tiles = -(-cached.heads // cached.kv_heads // _TILE) * cached.kv_heads
    splits = min(_MAX_SPLITS, triton.next_power_of_2(max(1, _PROGRAMS // (batch.tokens * tiles))))
    table = batch.tables[group]
    sums = torch.empty(batch.tokens, cached.heads, splits, cached.value, device=out.device)
    stats = torch.empty(batch.tokens, cached.heads, splits, 2, device=out.device)
    block_v = _block(cached.value)
    _attend[batch.tokens, tiles, splits](
        batch.base, queries, batch.sequences, batch.positions, table, sums, stats, table.stride(0), cached.keys_at,
        cached.values_at, cached.window or 0, cached.scale,
        HEADS=cached.heads, KV_HEADS=cached.kv_heads, DIM=cached.key, REST=cached.rest, VALUE=cached.value,
        SHARED=cached.shared, WINDOW=cached.window is not None, HALF=cached.half, SPLITS=splits, TILE=_TILE,
        BLOCK_D=_block(cached.key), BLOCK_R=_block(cached.rest), BLOCK_V=block_v,
        num_warps=8 if block_v >= 256 else 4,
        num_stages=2 if cached.half else 1,  # wide keys in more of them are more than a GPU's shared memory
    )  # fmt: skip
    tile = triton.next_power_of_2(cached.heads) if INTERPRETED else 1
    _put_together[batch.tokens, -(-cached.heads // tile)](
        sums, stats, stats if sinks is None else sinks, stats if gates is None else gates, out,
        0 if gates is None else gates.stride(0), 0 if gates is None else gates.stride(1),
        HEADS=cached.heads, VALUE=cached.value, SPLITS=splits, SINKS=sinks is not None, GATED=gates is not None,
        TILE=tile, BLOCK_V=block_v,
    )  # fmt: skip


def _block(numbers: int) -> int:
    """Of a product's inner side: tensor cores take no fewer than 16."""
    size: int = triton.next_power_of_2(numbers)
    return max(16, size)


def _attend_whole(
    cached: Cached,
    queries: torch.Tensor,
    base: torch.Tensor,
    table: torch.Tensor,
    rows: Rows,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """One sequence's tokens: `queries` [n, heads, key + rest] → `out` [n, heads, value]."""
    device, count, share = queries.device, rows.tokens, cached.heads // cached.kv_heads
    by_head = queries.view(count, cached.kv_heads, share, -1).permute(1, 2, 0, 3).flatten(1, 2)  # [kv, share * n, …]
    top = torch.full((cached.kv_heads, share * count, 1), _NOTHING.value, device=device)
    total = torch.zeros_like(top)
    if sinks is not None:
        top = sinks.view(cached.kv_heads, share, 1).expand(-1, -1, count).reshape(top.shape)
        total = torch.ones_like(top)
    sum = torch.zeros(*top.shape[:2], cached.value, device=device)
    positions = torch.arange(rows.start, rows.start + count, device=device).repeat(share)[:, None]
    end = rows.start + count
    begin = 0 if cached.window is None else max(0, rows.start - cached.window + 1) // PAGE * PAGE
    for start in range(begin, end, _KEYS_AT_ONCE):
        stop = min(end, start + _KEYS_AT_ONCE)
        keys, values = _read_pages(cached, base, table[start // PAGE : -(-stop // PAGE)], stop - start)
        where = torch.arange(start, stop, device=device)[None]
        seen = where <= positions
        if cached.window is not None:
            seen &= where > positions - cached.window
        scores = by_head @ keys.transpose(1, 2) * cached.scale
        scores.masked_fill_(~seen, _NOTHING.value)
        higher = torch.maximum(top, scores.amax(2, keepdim=True))
        p = torch.exp(scores - higher).masked_fill_(~seen, 0.0)
        kept = torch.exp(top - higher)
        total = total * kept + p.sum(2, keepdim=True)
        sum = sum * kept + p @ values
        top = higher
    mixed = (sum / total).view(cached.kv_heads, share, count, -1).permute(2, 0, 1, 3)
    out.copy_(mixed.reshape(out.shape))


def _read_pages(
    cached: Cached, base: torch.Tensor, table: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys f32 [kv_heads, tokens, key + rest] and values of the first tokens of some pages."""

    def read(at: int, numbers: int) -> torch.Tensor:
        dtype = torch.bfloat16 if cached.half else torch.float32
        copy = torch.empty(len(table), cached.kv_heads, PAGE, numbers, dtype=dtype, device=table.device)
        words = copy[0].nbytes // 4
        _copy_pages[len(table), -(-words // 1024)](base, table, copy.view(torch.int32), at, words, BLOCK=1024)
        return copy.transpose(0, 1).flatten(1, 2)[:, :tokens].float()

    keys = read(cached.keys_at, cached.key + cached.rest)
    return keys, keys[:, :, : cached.value] if cached.shared else read(cached.values_at, cached.value)
