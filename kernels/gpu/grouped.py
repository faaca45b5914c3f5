"""Triton kernels: the products of a layer's (token, expert) pairs with their experts' projections.

Pairs are sorted by expert and cut into tiles of at most `TILE` pairs of one expert, so that no group is padded to the
largest one. One launch does a projection for all tiles: program (row block, tile) streams BLOCK_ROWS rows of the
tile's expert once and multiplies them with the tile's vectors. A tile of one pair is computed in f32 (the memory
decides); larger ones go to the tensor cores, in bf16, or in f32 for f32 weights.

The kernels run on CUDA and, as they use nothing of a maker's own, should on ROCm; without a GPU under
TRITON_INTERPRET=1.
"""

# The names of kernels' arguments are Triton's to type.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

import triton
import triton.language as tl

FORMATS = (
    "f32", "bf16", "f16", "fp8_block", "int4_g32", "int4_g64", "int4_g128", "mxfp4", "q8_0", "q4_0", "q4_k", "q6_k"
)  # fmt: skip
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

# Triton's interpreter multiplies bf16 matrices as if they were integers; widened they come out as on a GPU.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

F32 = tl.constexpr(0)
BF16 = tl.constexpr(1)
F16 = tl.constexpr(2)
FP8 = tl.constexpr(3)
INT4_G32 = tl.constexpr(4)
INT4_G64 = tl.constexpr(5)
MXFP4 = tl.constexpr(7)
Q8_0 = tl.constexpr(8)
Q4_0 = tl.constexpr(9)
Q4_K = tl.constexpr(10)
Q6_K = tl.constexpr(11)


@triton.jit
def _at(base, offset, kind: tl.constexpr):
    """`base` (uint8) + `offset` bytes, as a pointer to `kind`."""
    return (base + offset).to(tl.pointer_type(kind))


@triton.jit
def _e4m3(code):
    """f32 of e4m3 codes (uint8), by bits: 1 sign, 4 exponent (bias 7), 3 fraction bits; 0x7f is NaN."""
    wide = code.to(tl.uint32)
    number = ((wide & 0x7F) << 20).to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0  # 2^120
    number = tl.where((wide & 0x7F) == 0x7F, float("nan"), number)
    return tl.where((wide & 0x80) != 0, -number, number)


@triton.jit
def _e2m1(code):
    """f32 of e2m1 codes: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and their negatives."""
    exponent = (code >> 1) & 3
    odd = (code & 1).to(tl.float32)
    normal = (1.0 + 0.5 * odd) * ((exponent + 126).to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    number = tl.where(exponent == 0, 0.5 * odd, normal)
    return tl.where((code & 8) != 0, -number, number)


@triton.jit
def _e8m0(code):
    """f32 of a power of two, 2^(code - 127); code 0 is f32's subnormal 2^-127."""
    wide = code.to(tl.uint32)
    bits = tl.where(wide == 0, 0x00400000, wide << 23).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _plain_weights(base, rows, k, columns, live, fmt: tl.constexpr):
    """f32 [rows, k]: the weights of `rows` int64 [R, 1] at the columns `k` int64 [1, K]; `live` masks what exists."""
    at = rows * columns + k
    if fmt == F32:
        return tl.load(_at(base, 0, tl.float32) + at, mask=live, other=0.0)
    if fmt == BF16:
        return tl.load(_at(base, 0, tl.bfloat16) + at, mask=live, other=0.0).to(tl.float32)
    return tl.load(_at(base, 0, tl.float16) + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _byte_weights(base, o_scales, rows, exists, start, columns, fmt: tl.constexpr, BLOCK_K: tl.constexpr):
    """f32 [rows, BLOCK_K / 32, 32]: the weights of `rows` from the column `start` on, of formats of a byte.

    `rows` are int64 [R, 1, 1], `exists` masks them. Bytes are loaded 16 at a time, a scale once for 32 columns.
    """
    block = start + tl.arange(0, BLOCK_K // 32)[None, :, None] * 32  # of columns
    lane = tl.arange(0, 32)[None, None, :]
    at = rows * columns + block
    live = exists & (block < columns)
    if fmt == FP8:
        place = rows // 128 * (columns // 128) + block // 128
        scale = tl.load(_at(base, o_scales, tl.float32) + place, mask=live, other=0.0)
        return _e4m3(tl.load(base + at + lane, mask=live, other=0)) * scale
    scale = tl.load(_at(base, o_scales, tl.float16) + at // 32, mask=live, other=0.0).to(tl.float32)
    return tl.load(_at(base, 0, tl.int8) + at + lane, mask=live, other=0).to(tl.float32) * scale


@triton.jit
def _nibble_weights(
    base, o_scales, o_second, o_factors, rows, exists, start, columns,
    half: tl.constexpr, fmt: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """f32 [rows, BLOCK_K / 32, 16]: as `_byte_weights`, of formats of half a byte; of each 32 the `half`, 0 or 1."""
    block = start + tl.arange(0, BLOCK_K // 32)[None, :, None] * 32  # of columns
    at = rows * columns + block
    live = exists & (block < columns)
    lane = tl.arange(0, 16)[None, None, :]
    byte = tl.load(base + at // 32 * 16 + lane, mask=live, other=0)
    code = (byte >> (4 * half)) & 15
    if fmt == Q4_0:
        scale = tl.load(_at(base, o_scales, tl.float16) + at // 32, mask=live, other=0.0).to(tl.float32)
        return (code.to(tl.float32) - 8.0) * scale
    if fmt == MXFP4:
        return _e2m1(code) * _e8m0(tl.load(base + o_scales + at // 32, mask=live, other=0))
    if fmt == Q4_K:
        factors = _at(base, o_factors, tl.float16) + at // 256 * 2
        d = tl.load(factors, mask=live, other=0.0).to(tl.float32)
        d_min = tl.load(factors + 1, mask=live, other=0.0).to(tl.float32)
        scale = tl.load(base + o_scales + at // 32, mask=live, other=0).to(tl.float32)
        minimum = tl.load(base + o_second + at // 32, mask=live, other=0).to(tl.float32)
        return code.to(tl.float32) * (d * scale) - d_min * minimum
    if fmt == Q6_K:
        high = tl.load(base + o_second + at // 64 * 16 + lane, mask=live, other=0)
        upper = (high >> (block // 32 % 2 * 4 + 2 * half).to(tl.uint8)) & 3
        d = tl.load(_at(base, o_factors, tl.float16) + at // 256, mask=live, other=0.0).to(tl.float32)
        scale = tl.load(_at(base, o_scales, tl.int8) + at // 16 + half, mask=live, other=0).to(tl.float32)
        return ((code | upper << 4).to(tl.float32) - 32.0) * (d * scale)
    group: tl.constexpr = 32 if fmt == INT4_G32 else 64 if fmt == INT4_G64 else 128
    scale = tl.load(_at(base, o_scales, tl.float16) + at // group, mask=live, other=0.0).to(tl.float32)
    coded = tl.load(base + o_second + at // group, mask=live, other=0).to(tl.uint32)
    factor = ((127 - 8 * (coded >> 4)) << 23).to(tl.float32, bitcast=True)  # 2^-8n, exactly
    return (code.to(tl.float32) - (coded & 15).to(tl.float32)) * (scale * factor)


@triton.jit
def _multiply(
    base, o_scales, o_second, o_factors, row, rows, columns, x, x_row, x_rows, x_live, x_columns,
    FMT: tl.constexpr, TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """f32 [TILE, BLOCK_ROWS]: the vectors x[x_rows], `x_row` numbers apart, times the weights' rows from `row` on."""
    blocks: tl.constexpr = FMT > F16
    halves: tl.constexpr = 2 if FMT > FP8 and FMT != Q8_0 else 1
    lanes = tl.arange(0, BLOCK_K // halves).to(tl.int64)
    which = (row + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    sums = tl.zeros((TILE, BLOCK_ROWS), dtype=tl.float32)
    if blocks:
        partial = tl.zeros((BLOCK_ROWS, BLOCK_K // 32, 32 // halves), dtype=tl.float32)
    else:
        partial = tl.zeros((BLOCK_ROWS, BLOCK_K), dtype=tl.float32)
    for start in range(0, columns, BLOCK_K):
        for half in tl.static_range(halves):
            exists = which < rows
            k = start + lanes
            if halves == 2:
                k = start + lanes // 16 * 32 + half * 16 + lanes % 16
            if blocks:
                the_rows, exist = which[:, None, None], exists[:, None, None]
                if halves == 2:
                    w = _nibble_weights(
                        base, o_scales, o_second, o_factors, the_rows, exist, start, columns, half, FMT, BLOCK_K
                    )
                else:
                    w = _byte_weights(base, o_scales, the_rows, exist, start, columns, FMT, BLOCK_K)
                if TILE > 1:
                    w = tl.reshape(w, (BLOCK_ROWS, BLOCK_K // halves))
            else:
                live = exists[:, None] & (k < columns)[None, :]
                w = _plain_weights(base, which[:, None], k[None, :], columns, live, FMT)
            x_at = x + x_rows[:, None] * x_row + k[None, :]
            xs = tl.load(x_at, mask=x_live[:, None] & (k < x_columns)[None, :], other=0.0).to(tl.float32)
            if TILE == 1:
                if blocks:
                    xs = tl.reshape(xs, (1, BLOCK_K // 32, 32 // halves))
                partial += w * xs
            elif FMT == F32:
                sums = tl.dot(xs, tl.trans(w), sums, input_precision="ieee")
            elif INTERPRETED:
                sums = tl.dot(xs.to(tl.bfloat16).to(tl.float32), tl.trans(w.to(tl.bfloat16).to(tl.float32)), sums)
            else:
                sums = tl.dot(xs.to(tl.bfloat16), tl.trans(w.to(tl.bfloat16)), sums)
    if TILE == 1:
        if blocks:
            partial = tl.sum(partial, 2)
        sums = tl.sum(partial, 1)[None, :]
    return sums


@triton.jit
def _activate(z, alpha, ACTIVATION: tl.constexpr):
    if ACTIVATION == 0:
        return z / (1.0 + tl.exp(-alpha * z))
    if ACTIVATION == 1:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    if ACTIVATION == 2:
        u = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        return z / (1.0 + tl.exp(-2.0 * u))
    if ACTIVATION == 3:
        return tl.maximum(z, 0.0)
    return tl.maximum(z, 0.0) * tl.maximum(z, 0.0)


@triton.jit(do_not_specialize=["arena"], do_not_specialize_on_alignment=["tokens"])
def up_projection(
    arena, tiles, tokens, x, out, hidden, middle, columns, bias, o_values, o_scales, o_second, o_factors,
    alpha, limit, up_offset,
    FMT: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, LIMIT: tl.constexpr,
    TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [tokens, hidden] → out [pairs, middle], activation included.

    `tiles` int64 [tiles, 3]: an expert's first byte from the arena's, its first sorted pair here, how many; `tokens`
    int64 [pairs]: the token of each sorted pair. LIMIT: 0 none, 1 before the activation, 2 after it. The arena is
    not specialized: Triton would take 32 bits for an address from it on AMD's GPUs, since the tensor itself is small.
    """
    tile = tiles + tl.program_id(1) * 3
    expert = tl.multiple_of(arena + tl.load(tile), 128)  # so that loads can be wide
    first = tl.load(tile + 1)
    lanes = tl.arange(0, TILE)
    live = lanes < tl.load(tile + 2)
    x_rows = tl.load(tokens + first + lanes, mask=live, other=0)
    row = tl.program_id(0) * BLOCK_ROWS
    which = row + tl.arange(0, BLOCK_ROWS)
    here = which < middle
    base = expert + o_values
    all_rows = middle
    if GATED:
        all_rows = 2 * middle
    up = _multiply(
        base, o_scales, o_second, o_factors, row + all_rows - middle, all_rows, columns, x, hidden, x_rows, live,
        hidden, FMT, TILE, BLOCK_ROWS, BLOCK_K,
    )  # fmt: skip
    biases = _at(expert, bias, tl.float32)
    if BIAS:
        up += tl.load(biases + which + all_rows - middle, mask=here, other=0.0)[None, :]
    if GATED:
        gate = _multiply(
            base, o_scales, o_second, o_factors, row, all_rows, columns, x, hidden, x_rows, live, hidden,
            FMT, TILE, BLOCK_ROWS, BLOCK_K,
        )  # fmt: skip
        if BIAS:
            gate += tl.load(biases + which, mask=here, other=0.0)[None, :]
        if LIMIT == 1:
            gate = tl.where(gate > limit, limit, gate)
        gate = _activate(gate, alpha, ACTIVATION)
        if LIMIT == 2:
            gate = tl.where(gate > limit, limit, gate)
        if LIMIT > 0:
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        up = gate * (up + up_offset)
    else:
        up = _activate(up, alpha, ACTIVATION)
    to = out + (first + lanes).to(tl.int64)[:, None] * middle + which[None, :]
    tl.store(to, up, mask=live[:, None] & here[None, :])


@triton.jit(do_not_specialize=["arena"], do_not_specialize_on_alignment=["places"])
def down_projection(
    arena, tiles, places, weights, x, out, hidden, middle, columns, bias, o_values, o_scales, o_second, o_factors,
    FMT: tl.constexpr, BIAS: tl.constexpr, TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x [sorted pairs, middle] → out [pairs, hidden], row `places[i]` for the sorted pair i, times weights[i]."""
    tile = tiles + tl.program_id(1) * 3
    expert = tl.multiple_of(arena + tl.load(tile), 128)  # so that loads can be wide
    first = tl.load(tile + 1)
    lanes = tl.arange(0, TILE)
    live = lanes < tl.load(tile + 2)
    row = tl.program_id(0) * BLOCK_ROWS
    which = row + tl.arange(0, BLOCK_ROWS)
    here = which < hidden
    pairs = (first + lanes).to(tl.int64)
    y = _multiply(
        expert + o_values, o_scales, o_second, o_factors, row, hidden, columns, x, middle, pairs, live, middle,
        FMT, TILE, BLOCK_ROWS, BLOCK_K,
    )  # fmt: skip
    if BIAS:
        y += tl.load(_at(expert, bias, tl.float32) + which, mask=here, other=0.0)[None, :]
    y *= tl.load(weights + pairs, mask=live, other=0.0)[:, None]
    to = out + tl.load(places + pairs, mask=live, other=0)[:, None] * hidden + which[None, :]
    tl.store(to, y, mask=live[:, None] & here[None, :])


@triton.jit
def sum_pairs(pairs, offsets, out, hidden, BLOCK: tl.constexpr):
    """out [tokens, hidden]: each token's rows of `pairs`, added in their order; atomics would not keep one."""
    token = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < hidden
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for pair in range(tl.load(offsets + token), tl.load(offsets + token + 1)):
        total += tl.load(pairs + pair * hidden + at, mask=here, other=0.0)
    tl.store(out + token.to(tl.int64) * hidden + at, total, mask=here)


@triton.jit(do_not_specialize=["tokens"])
def linear(
    matrix, x, out, tokens, rows, inputs, columns, x_row, out_row, bias, o_scales, o_second, o_factors,
    FMT: tl.constexpr, BIAS: tl.constexpr, TILE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x f32 [tokens, inputs] → out f32 [tokens, rows], whose rows begin `x_row` and `out_row` numbers apart."""
    lanes = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)
    live = lanes < tokens
    row = tl.program_id(0) * BLOCK_ROWS
    which = row + tl.arange(0, BLOCK_ROWS)
    here = which < rows
    y = _multiply(
        matrix, o_scales, o_second, o_factors, row, rows, columns, x, x_row, lanes, live, inputs,
        FMT, TILE, BLOCK_ROWS, BLOCK_K,
    )  # fmt: skip
    if BIAS:
        y += tl.load(bias + which, mask=here, other=0.0)[None, :]
    tl.store(out + lanes[:, None] * out_row + which[None, :], y, mask=live[:, None] & here[None, :])
