"""Triton kernels of single rows: norms with what is added before them, gated activations, the router's choice.

On a GPU one program takes one row, or a part of a wide one; a pass of any size is one launch. Arithmetic is f32.
"""

# The names of kernels' arguments are Triton's to type.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from typing import Any

import torch
import triton
import triton.language as tl

from ..geometry import Activation
from ..trunk_ops import RouterLayer
from .grouped import ACTIVATIONS, _activate

ROWS = 32 if triton.knobs.runtime.interpret else 1  # of one program; the interpreter's run one after the other
_GATE_BLOCK = 1024
_SCORES = ("softmax", "sigmoid", "chosen_softmax")


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["tokens"])
def _add_norm(
    hidden, add, more, share, norm, out, half, tokens, width, share_row, eps,
    ADD: tl.constexpr, MORE: tl.constexpr, SHARE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    at = tl.arange(0, BLOCK)
    here = (row < tokens)[:, None] & (at < width)[None, :]
    place = row[:, None] * width + at[None, :]
    h = tl.load(hidden + place, mask=here, other=0.0)
    if ADD:
        h += tl.load(add + place, mask=here, other=0.0).to(tl.float32)
    if MORE:
        extra = tl.load(more + place, mask=here, other=0.0)
        if SHARE:
            extra *= sigmoid(tl.load(share + row * share_row, mask=row < tokens, other=0.0))[:, None]
        h += extra
    if ADD or MORE:
        tl.store(hidden + place, h, mask=here)
    weight = tl.load(norm + at, mask=at < width, other=0.0)
    y = h / tl.sqrt(tl.sum(h * h, 1) / width + eps)[:, None] * weight[None, :]
    tl.store(out + place, y, mask=here)
    if HALF:
        tl.store(half + place, y.to(tl.bfloat16), mask=here)


def add_norm(
    hidden: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    add: torch.Tensor | None = None,
    more: torch.Tensor | None = None,
    share: torch.Tensor | None = None,
    half: torch.Tensor | None = None,
) -> None:
    """`hidden` [T, H] += add + more * sigmoid(share), then `out` [T, H] = its RMS norm times `norm` [H].

    `add` [T, H] f32 or bf16, `more` [T, H]; `share` [T], of any stride. `half` bf16 [T, H] gets `out` too.
    """
    tokens, width = hidden.shape
    block = triton.next_power_of_2(width)
    _add_norm[(-(-tokens // ROWS),)](
        hidden, _or(add, hidden), _or(more, hidden), _or(share, hidden), norm, out, _or(half, out), tokens, width,
        0 if share is None else share.stride(0), eps,
        ADD=add is not None, MORE=more is not None, SHARE=share is not None, HALF=half is not None,
        ROWS=ROWS, BLOCK=block, num_warps=8 if block >= 4096 else 4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _gate(rows, out, tokens, row_size, middle, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    token = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    at = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    here = (token < tokens) & (at < middle)
    gate = _activate(tl.load(rows + token * row_size + at, mask=here, other=0.0), 1.0, ACTIVATION)
    up = tl.load(rows + token * row_size + middle + at, mask=here, other=0.0)
    tl.store(out + token * middle + at, gate * up, mask=here)


def gate(rows: torch.Tensor, activation: Activation, out: torch.Tensor) -> None:
    """`out` [T, n] = activation(rows[:, :n]) * rows[:, n : 2 * n]."""
    tokens, middle = out.shape
    _gate[-(-middle // _GATE_BLOCK), -(-tokens // ROWS)](
        rows, out, tokens, rows.stride(0), middle,
        ACTIVATION=ACTIVATIONS.index(activation), ROWS=ROWS, BLOCK=_GATE_BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _route(
    logits, bias, ids, weights, tokens, scaling,
    EXPERTS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP_K: tl.constexpr, SCORES: tl.constexpr,
    RENORMALIZE: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    nothing = float("-inf")
    size: tl.constexpr = EXPERTS // GROUPS
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    group = tl.arange(0, BLOCK_G)[None, :]
    member = tl.arange(0, BLOCK_S)[None, None, :]
    number = group[:, :, None] * size + member
    exists = (group < GROUPS)[:, :, None] & (member < size)
    live = (row < tokens)[:, None, None] & exists
    x = tl.load(logits + row[:, None, None] * EXPERTS + number, mask=live, other=0.0)  # [ROWS, groups, members]
    x = tl.where(exists, x, nothing)
    if SCORES == 0:
        e = tl.exp(x - tl.max(tl.max(x, 2), 1)[:, None, None])
        scores = e / tl.sum(tl.sum(e, 2), 1)[:, None, None]
    elif SCORES == 1:
        scores = sigmoid(x)
    else:
        scores = x
    choice = scores
    if BIAS:
        choice += tl.load(bias + number, mask=exists, other=0.0)
    choice = tl.where(exists, choice, nothing)
    if GROUPS > 1:  # those with the largest sums of their two best
        best = tl.max(choice, 2)
        at_best = tl.min(tl.where(choice == best[:, :, None], member, BLOCK_S), 2)
        sums = best + tl.max(tl.where(member == at_best[:, :, None], nothing, choice), 2)
        sums = tl.where(group < GROUPS, sums, nothing)
        left = tl.zeros((ROWS, BLOCK_G), dtype=tl.int32)
        for _ in range(TOP_GROUPS):
            largest = tl.min(tl.where(sums == tl.max(sums, 1)[:, None], group, BLOCK_G), 1)[:, None]
            left = tl.where(group == largest, 1, left)
            sums = tl.where(group == largest, nothing, sums)
        choice = tl.where(left[:, :, None] > 0, choice, nothing)
    lane = tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.zeros((ROWS, BLOCK_K), dtype=tl.int32)
    values = tl.zeros((ROWS, BLOCK_K), dtype=tl.float32)
    for i in range(TOP_K):
        best_choice = tl.max(tl.max(choice, 2), 1)[:, None, None]
        expert = tl.min(tl.min(tl.where(choice == best_choice, number, EXPERTS), 2), 1)[:, None, None]
        taken = (number == expert) & exists
        value = tl.sum(tl.sum(tl.where(taken, scores, 0.0), 2), 1)[:, None]
        chosen = tl.where(lane == i, tl.reshape(expert, (ROWS, 1)), chosen)
        values = tl.where(lane == i, value, values)
        choice = tl.where(taken, nothing, choice)
    kept = lane < TOP_K
    if SCORES == 2:
        values = tl.exp(values - tl.max(tl.where(kept, values, nothing), 1)[:, None])
    values = tl.where(kept, values, 0.0)
    if RENORMALIZE or SCORES == 2:
        total = tl.sum(values, 1)[:, None]
        if SCORES == 1:
            total += 1e-20
        values /= total
    place = row[:, None] * TOP_K + lane
    here = (row < tokens)[:, None] & kept
    tl.store(ids + place, chosen.to(tl.int64), mask=here)
    tl.store(weights + place, values * scaling, mask=here)


def route(
    router: RouterLayer, bias: torch.Tensor | None, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> None:
    """The experts of each token, likeliest first: `logits` [T, experts] → `ids` int64, `weights` [T, top_k].

    `bias` is the router's own, on the device; the lower number wins a tie.
    """
    size = router.experts // router.groups
    flags: dict[str, Any] = {"RENORMALIZE": router.renormalize, "BIAS": bias is not None}
    _route[(-(-len(logits) // ROWS),)](
        logits, _or(bias, logits), ids, weights, len(logits), router.scaling,
        EXPERTS=router.experts, GROUPS=router.groups, TOP_GROUPS=router.top_groups, TOP_K=router.top_k,
        SCORES=_SCORES.index(router.scores), ROWS=ROWS, BLOCK_G=triton.next_power_of_2(router.groups),
        BLOCK_S=triton.next_power_of_2(size), BLOCK_K=triton.next_power_of_2(router.top_k), **flags,
    )  # fmt: skip


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A pointer that no kernel follows, where there is none."""
    return other if tensor is None else tensor
