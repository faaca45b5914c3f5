"""A router beside its layer: which experts a later layer may ask for, and a choice that spares a slow disk."""

import numpy as np
import numpy.typing as npt
import torch

from moehive.kernels.trunk_ops import RouterLayer

from ..base import Tiers

FEW_TOKENS = 8  # in a pass; the experts of more are nearly all of them
LAYERS = 2  # that are foreseen: a router's guess is older by a layer for the second, and the disk gets twice the time


def likely(router: RouterLayer, logits: torch.Tensor) -> list[int]:
    """Experts that a layer with these router logits f32 [T, experts] would choose, likeliest first.

    After T * top_k of them, half as many that it nearly chooses: for a disk that has nothing else to do.
    """
    choice = _choice(router, _scores(router, logits)).amax(0)
    count = min(router.experts, len(logits) * router.top_k * 3 // 2)
    return choice.topk(count).indices.tolist()


def spare_disks(
    tiers: Tiers,
    ordinal: int,
    router: RouterLayer,
    logits: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Chooses again, in place, among a MoE layer's experts on disk and in memory: see prefer_in_memory."""
    if tiers.margin and (on_disk := tiers.on_disk(ordinal)) is not None:
        prefer_in_memory(router, logits, on_disk, tiers.margin, ids, weights)


def prefer_in_memory(
    router: RouterLayer,
    logits: torch.Tensor,
    on_disk: npt.NDArray[np.bool_],
    margin: float,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Chooses again, in place: an expert in memory counts `margin` of its score more than one on disk.

    So an expert on disk is replaced only by one whose score is within the margin. `ids` int64 and `weights` f32
    [T, top_k] are the router's own choice; groups that it did not choose from stay out. Weights are of true scores.
    """
    scores = _scores(router, logits)
    choice = _choice(router, scores)
    bonus = torch.from_numpy(~on_disk) * margin
    choice = choice + choice.abs() * bonus
    if router.groups > 1:
        size = router.experts // router.groups
        allowed = torch.zeros(len(logits), router.groups, dtype=torch.bool).scatter_(1, ids // size, True)
        choice = choice.masked_fill(~allowed.repeat_interleave(size, 1), float("-inf"))
    chosen = choice.topk(router.top_k, sorted=True).indices
    values = scores.gather(1, chosen)
    if router.renormalize or router.scores == "chosen_softmax":
        values = values / values.sum(1, keepdim=True)
    ids.copy_(chosen)
    weights.copy_(values * router.scaling)


def _scores(router: RouterLayer, logits: torch.Tensor) -> torch.Tensor:
    """Positive scores of all experts; up to a factor for each token where only those of the chosen count."""
    return logits.sigmoid() if router.scores == "sigmoid" else logits.softmax(1)


def _choice(router: RouterLayer, scores: torch.Tensor) -> torch.Tensor:
    return scores if router.bias is None else scores + router.bias
