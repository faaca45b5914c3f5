"""Gated DeltaNet on a GPU: what is between a layer's projections, in four launches for a pass of any size.

The convolution and the gated norm take every token by itself, the recurrence one sequence's tokens after each other;
a program holds a part of a head's state in registers meanwhile. States are addressed through a table, and updated in
place; the order of a recurrent state is [value_heads, keys, values up to 16], in the room of the CPU's.
"""

# The names of kernels' arguments are Triton's to type.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import torch
import triton
import triton.language as tl

from ..delta_net import DeltaNetLayer, row_places
from .batch import DeviceBatch
from .grouped import INTERPRETED
from .rows import ROWS, sigmoid

_CHANNELS = 256  # of one program
_VALUES = 32  # of a head's values in one program: so many columns of its state


@triton.jit
def _state(base, states, sequence, states_row, number):
    """Where a sequence's state lies."""
    return tl.multiple_of(base + tl.load(states + sequence * states_row + number), 64).to(tl.pointer_type(tl.float32))


@triton.jit(
    do_not_specialize=["base", "tokens", "number"],
    do_not_specialize_on_alignment=["states", "sequences", "positions", "firsts"],
)
def _convolve(
    base, rows, places, conv, states, sequences, positions, firsts, mixed, tokens, row_size, channels, states_row,
    number, TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    at = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    has_token = tl.load(positions + token, mask=token < tokens, other=-1) >= 0
    here = has_token[:, None] & (at < channels)
    sequence = tl.load(sequences + token, mask=has_token, other=0)
    local = (token - tl.load(firsts + sequence))[:, None]
    column = tl.load(places + at, mask=at < channels, other=0)
    kept = _state(base, states, sequence, states_row, number)[:, None]
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        back = TAPS - 1 - tap
        weight = tl.load(conv + tap * channels + at, mask=at < channels, other=0.0)
        new = tl.load(rows + (token[:, None] - back) * row_size + column, mask=here & (local >= back), other=0.0)
        old = tl.load(kept + (local + tap) * channels + at, mask=here & (local < back), other=0.0)
        total += weight * (new + old)
    exists = (token < tokens)[:, None] & (at < channels)
    tl.store(mixed + token[:, None] * channels + at, total * sigmoid(total), mask=exists)


@triton.jit(do_not_specialize=["base", "number"], do_not_specialize_on_alignment=["states", "firsts", "counts"])
def _keep_inputs(
    base, rows, places, states, firsts, counts, row_size, channels, states_row, number,
    TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + sequence)
    if count > 0:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        here = at < channels
        first = tl.load(firsts + sequence)
        column = tl.load(places + at, mask=here, other=0)
        kept = _state(base, states, sequence, states_row, number)
        for j in tl.static_range(TAPS - 1):  # reads further than it writes
            local = count - (TAPS - 1) + j + at * 0  # a block, as the masks are
            new = tl.load(rows + (first + local) * row_size + column, mask=here & (local >= 0), other=0.0)
            old = tl.load(kept + (j + count) * channels + at, mask=here & (local < 0), other=0.0)
            tl.store(kept + j * channels + at, new + old, mask=here)


@triton.jit(do_not_specialize=["base", "number"], do_not_specialize_on_alignment=["states", "firsts", "counts"])
def _recur(
    base, mixed, rows, b_places, a_places, decay, dt_bias, states, firsts, counts, out,
    row_size, channels, states_row, number, scale,
    KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + sequence)
    if count > 0:
        head = tl.program_id(1) * TILE + tl.arange(0, TILE)
        exists = head < VALUE_HEADS
        key_head = (head // (VALUE_HEADS // KEY_HEADS))[:, None]
        k_at = tl.arange(0, BLOCK_K)[None, :]
        v_at = (tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V))[None, :]
        keys_here = exists[:, None] & (k_at < KEYS)
        values_here = exists[:, None] & (v_at < VALUES)
        live = keys_here[:, :, None] & values_here[:, None, :]
        place = (head[:, None] * KEYS + k_at)[:, :, None] * WIDTH + v_at[:, None, :]
        kept = _state(base, states, sequence, states_row, number) + place
        state = tl.load(kept, mask=live, other=0.0)  # [heads, keys, values]
        first = tl.load(firsts + sequence)
        rate = tl.load(decay + head, mask=exists, other=0.0)
        dt_offset = tl.load(dt_bias + head, mask=exists, other=0.0)
        b_place = tl.load(b_places + head, mask=exists, other=0)
        a_place = tl.load(a_places + head, mask=exists, other=0)
        for token in range(first, first + count):
            row = mixed + token * channels
            q = tl.load(row + key_head * KEYS + k_at, mask=keys_here, other=0.0)
            k = tl.load(row + (KEY_HEADS + key_head) * KEYS + k_at, mask=keys_here, other=0.0)
            v = tl.load(row + 2 * KEY_HEADS * KEYS + head[:, None] * VALUES + v_at, mask=values_here, other=0.0)
            q *= (scale / tl.sqrt(tl.sum(q * q, 1) + 1e-6))[:, None]
            k *= (1.0 / tl.sqrt(tl.sum(k * k, 1) + 1e-6))[:, None]
            dt = tl.load(rows + token * row_size + a_place, mask=exists, other=0.0) + dt_offset
            dt = tl.where(dt > 20.0, dt, tl.log(1.0 + tl.exp(tl.minimum(dt, 20.0))))
            state *= tl.exp(rate * dt)[:, None, None]
            remembered = tl.sum(state * k[:, :, None], 1)
            strength = sigmoid(tl.load(rows + token * row_size + b_place, mask=exists, other=0.0))
            change = (v - remembered) * strength[:, None]
            state += k[:, :, None] * change[:, None, :]
            y = tl.sum(state * q[:, :, None], 1)
            tl.store(out + (token * VALUE_HEADS + head)[:, None] * VALUES + v_at, y, mask=values_here)
        tl.store(kept, state, mask=live)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["positions"])
def _gated_norm(
    y, rows, positions, z_places, to, norm, out, tokens, row_size, eps,
    HEADS: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    head = tl.program_id(1)
    at = tl.arange(0, BLOCK)[None, :]
    exists = (token < tokens) & (at < VALUES)
    here = exists & (tl.load(positions + token, mask=token < tokens, other=-1) >= 0)
    x = tl.load(y + (token * HEADS + head) * VALUES + at, mask=here, other=0.0)
    z = tl.load(rows + token * row_size + tl.load(z_places + head) + at, mask=here, other=0.0)
    x = x / tl.sqrt(tl.sum(x * x, 1) / VALUES + eps)[:, None]
    x *= tl.load(norm + at, mask=at < VALUES, other=0.0) * z * sigmoid(z)
    tl.store(out + token * HEADS * VALUES + tl.load(to + head) + at, x, mask=exists)


class GpuDeltaNet:
    """One layer; keeps its small weights on the device."""

    def __init__(self, layer: DeltaNetLayer, states: tuple[int, int], device: torch.device) -> None:
        """`states`: which of a sequence's states are the convolution's and the recurrent one."""
        self._layer = layer
        self._conv_state, self._recurrent_state = states
        segments, z, b, a = row_places(layer)
        channels = torch.empty(layer.channels, dtype=torch.int64)
        for start, first, count in zip(segments[0::3], segments[1::3], segments[2::3], strict=True):
            channels[first : first + count] = torch.arange(start, start + count)
        self._channels = channels.to(device)
        to = [place * layer.value_dim for place in layer.out_order or range(layer.value_heads)]
        self._z, self._b, self._a, self._to = (torch.tensor(places, device=device) for places in (z, b, a, to))
        self._conv, self._decay, self._dt_bias, self._norm = (
            tensor.contiguous().to(device) for tensor in (layer.conv, layer.decay, layer.dt_bias, layer.norm)
        )

    def __call__(self, rows: torch.Tensor, batch: DeviceBatch) -> torch.Tensor:
        """`rows` f32 [T, layer.row] → f32 [T, value_heads * value_dim]; updates the sequences' states."""
        layer, tokens, sequences = self._layer, len(rows), len(batch.counts)
        blocks, size, row = -(-layer.channels // _CHANNELS), layer.channels, rows.stride(0)
        table = batch.states
        mixed = torch.empty(tokens, size, device=rows.device)
        y = torch.empty(tokens, layer.value_heads, layer.value_dim, device=rows.device)
        out = torch.empty(tokens, layer.value_heads * layer.value_dim, device=rows.device)
        _convolve[blocks, -(-tokens // ROWS)](
            batch.base, rows, self._channels, self._conv, table, batch.sequences, batch.positions, batch.firsts,
            mixed, tokens, row, size, table.stride(0), self._conv_state,
            TAPS=len(layer.conv), ROWS=ROWS, BLOCK=_CHANNELS,
        )  # fmt: skip
        _keep_inputs[blocks, sequences](
            batch.base, rows, self._channels, table, batch.firsts, batch.counts, row, size, table.stride(0),
            self._conv_state, TAPS=len(layer.conv), BLOCK=_CHANNELS,
        )  # fmt: skip
        tile = triton.next_power_of_2(layer.value_heads) if INTERPRETED else 1
        block_v = min(_VALUES, triton.next_power_of_2(layer.value_dim))
        _recur[sequences, -(-layer.value_heads // tile), -(-layer.value_dim // block_v)](
            batch.base, mixed, rows, self._b, self._a, self._decay, self._dt_bias, table, batch.firsts, batch.counts,
            y, row, size, table.stride(0), self._recurrent_state, layer.key_dim**-0.5,
            KEY_HEADS=layer.key_heads, VALUE_HEADS=layer.value_heads, KEYS=layer.key_dim, VALUES=layer.value_dim,
            WIDTH=-(-layer.value_dim // 16) * 16, TILE=tile, BLOCK_K=triton.next_power_of_2(layer.key_dim),
            BLOCK_V=block_v,
        )  # fmt: skip
        _gated_norm[-(-tokens // ROWS), layer.value_heads](
            y, rows, batch.positions, self._z, self._to, self._norm, out, tokens, row, layer.norm_eps,
            HEADS=layer.value_heads, VALUES=layer.value_dim, ROWS=ROWS,
            BLOCK=triton.next_power_of_2(layer.value_dim),
        )  # fmt: skip
        return out
