"""Routers for a model that had none: k-means of what each layer sees.

With upcycled experts any router gives the dense model's text; this one makes routing a real, uneven function of the
text, as that of a trained model is.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import LlamaForCausalLM

SKIPPED = 4  # first tokens of a window: there a Llama's hidden states are far from all others
WINDOW = 256  # tokens in one forward pass
ROUNDS = 15  # of k-means; it stands still after about ten
LOGIT = 8.0  # logits of a token of mean length in a cluster's very direction


def layer_inputs(dense: LlamaForCausalLM, tokens: Sequence[int]) -> list[torch.Tensor]:
    """The inputs of each layer's feed-forward network on a text: one f32 [tokens, hidden] a layer.

    To be called with one torch thread: each core then works on a window of its own, with no barriers between them
    (2,400 tokens on two busy cores: 5 s, against 42 s with two threads in each matrix product).
    """
    current = threading.local()
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: current.kept.append(args[0][0, SKIPPED:]))
        for layer in dense.model.layers
    ]

    def forward(start: int) -> list[torch.Tensor]:
        current.kept = []
        with torch.no_grad():
            dense.model(torch.tensor([tokens[start : start + WINDOW]]), use_cache=False)
        kept: list[torch.Tensor] = current.kept
        return kept

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            windows = list(pool.map(forward, range(0, len(tokens) - SKIPPED, WINDOW)))
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(kept) for kept in zip(*windows, strict=True)]


def fit_router(inputs: torch.Tensor, experts: int, generator: torch.Generator) -> torch.Tensor:
    """A Mixtral router [experts, hidden] in f32 for a layer that sees `inputs` [tokens, hidden].

    Spherical k-means of the inputs less their mean. Mixtral's router has no bias, so the mean would favour the same
    experts for every token; the rows are therefore kept orthogonal to it.
    """
    mean = inputs.mean(0)
    axis = mean / mean.norm()
    points = inputs - mean
    points = points - torch.outer(points @ axis, axis)
    points = points / points.norm(dim=1, keepdim=True)
    rows = points[torch.randperm(len(points), generator=generator)[:experts]]
    for _ in range(ROUNDS):
        nearest = (points @ rows.T).argmax(1)
        sums = torch.zeros_like(rows).index_add_(0, nearest, points)
        empty = torch.bincount(nearest, minlength=experts) == 0
        sums[empty] = points[torch.randint(len(points), (int(empty.sum()),), generator=generator)]
        rows = sums / sums.norm(dim=1, keepdim=True)
    result: torch.Tensor = rows * (LOGIT / inputs.norm(dim=1).mean())
    return result
