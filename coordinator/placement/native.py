"""The planner's native library by ctypes: exact makespans and the annealing search (`cpp`)."""

import ctypes
import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moehive.kernels.library import load

from .traces import Batches

_ABI = 3

Floats = npt.NDArray[np.float64]
Replicas = npt.NDArray[np.uint64]  # [experts]: bit p says that place p holds the expert


class _Layer(ctypes.Structure):
    """MoehiveLayer of cpp/planner.h, field for field."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("experts", "places", "sizes", "reserved")),
        ("batches", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("fixed", "step", "always", "offsets", "hits", "size", "weight")),
    )


class _Search(ctypes.Structure):
    """MoehiveSearch of cpp/planner.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("slots", "pinned", "present")),
        *((name, ctypes.c_double) for name in ("copy_cost", "hot", "cold")),
        ("moves", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
    )


class _Proof(ctypes.Structure):
    """MoehiveProof of cpp/planner.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("experts", "sets", "kinds", "most", "nested", "reserved")),
        ("batches", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("offsets", "hits", "kind", "times", "price", "pair_price")),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = load("moehive_planner_abi", _ABI, "coordinator.placement", "planner")
    pointer = ctypes.c_void_p
    library.moehive_makespans.argtypes = (pointer, pointer, pointer)
    library.moehive_anneal.argtypes = (pointer, pointer, pointer, pointer)
    library.moehive_least_sum.argtypes = (pointer, pointer, pointer, pointer)
    library.moehive_count_pairs.argtypes = (ctypes.c_int64, ctypes.c_int64, pointer, pointer, pointer)
    library.moehive_count_pairs.restype = None
    return library


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Seconds of one layer on each place."""

    fixed: Floats  # [mixes, places]: once, if a place is asked at all
    step: Floats  # [places]: for each distinct expert
    always: Floats  # [places]: in every batch; 0 unless the shared expert is there


@dataclass(frozen=True, slots=True)
class Search:
    """Bounds of one annealing run; `copy_cost` is in units of the cost, temperatures are parts of the first cost."""

    slots: npt.NDArray[np.int32]  # [places]: experts that fit
    pinned: Replicas
    present: Replicas
    copy_cost: float
    moves: int
    seed: int
    hot: float
    cold: float


def makespans(costs: LayerCosts, batches: Batches, replicas: Replicas) -> Floats:
    """Seconds of each batch under exact dispatch; releases the GIL. Every expert must have a replica."""
    weight = np.ones(len(batches.mix))
    layer, _keep = _layer(costs, batches, weight, len(replicas))
    out = np.empty(len(batches.mix))
    _check(_library().moehive_makespans(ctypes.byref(layer), replicas.ctypes.data, out.ctypes.data))
    return out


def anneal(
    costs: LayerCosts, batches: Batches, weight: Floats, replicas: Replicas, search: Search
) -> tuple[Replicas, float]:
    """A better plan from `replicas`, and its cost: the sum of weight × makespan. Releases the GIL."""
    layer, _keep = _layer(costs, batches, weight, len(replicas))
    better = replicas.copy()
    cost = ctypes.c_double()
    native = _Search(
        search.slots.ctypes.data,
        search.pinned.ctypes.data,
        search.present.ctypes.data,
        search.copy_cost,
        search.hot,
        search.cold,
        search.moves,
        search.seed & 0xFFFF_FFFF_FFFF_FFFF,
    )
    _check(
        _library().moehive_anneal(ctypes.byref(layer), ctypes.byref(native), better.ctypes.data, ctypes.byref(cost))
    )
    return better, cost.value


class LeastSum(NamedTuple):
    """What `least_sum` finds."""

    sum: float  # seconds, over the batches
    used: npt.NDArray[np.int64]  # [sets, experts]: batches that take the expert
    pairs: npt.NDArray[np.int64]  # [sets]: pairs of experts that are taken together


def least_sum(
    offsets: npt.NDArray[np.int64], hits: npt.NDArray[np.uint16], kind: npt.NDArray[np.int32],
    times: Floats, nested: int, price: Floats, pair_price: Floats,
) -> LeastSum:  # fmt: skip
    """The least of each batch's time and prices over what it may take of its hits; releases the GIL.

    `offsets` [batches + 1] are into `hits`; `kind` [batches] says which row of `times` [sets, kinds, h] counts when h
    are taken; `price` [sets, experts] and `pair_price` [sets] are paid for what is taken, all in seconds. There are
    one or two sets; `nested` is 1 if the first lies within the second, -1 if the second does, else 0.
    """
    sets, kinds, most = times.shape
    used, pairs, total = np.zeros(price.shape, np.int64), np.zeros(sets, np.int64), ctypes.c_double()
    proof = _Proof(
        price.shape[1], sets, kinds, most - 1, nested, 0, len(kind),
        *(array.ctypes.data for array in (offsets, hits, kind, times, price, pair_price)),
    )  # fmt: skip
    _check(
        _library().moehive_least_sum(ctypes.byref(proof), ctypes.byref(total), used.ctypes.data, pairs.ctypes.data)
    )
    return LeastSum(total.value, used, pairs)


def count_pairs(offsets: npt.NDArray[np.int64], hits: npt.NDArray[np.uint16], experts: int) -> npt.NDArray[np.int32]:
    """[experts, experts], symmetric: in how many batches two are hit together, 0 on the diagonal; releases the GIL.

    `offsets` [batches + 1] are into `hits`, which are below `experts`, and differ within a batch.
    """
    counts = np.zeros((experts, experts), np.int32)
    _library().moehive_count_pairs(
        len(offsets) - 1, experts, offsets.ctypes.data, hits.ctypes.data, counts.ctypes.data
    )
    return counts + counts.T


def _layer(costs: LayerCosts, batches: Batches, weight: Floats, experts: int) -> tuple[_Layer, list[object]]:
    """The C side's view, and the arrays that it points into."""
    arrays = (
        np.ascontiguousarray(costs.fixed, dtype=np.float64),
        np.ascontiguousarray(costs.step, dtype=np.float64),
        np.ascontiguousarray(costs.always, dtype=np.float64),
        np.ascontiguousarray(batches.offsets),
        np.ascontiguousarray(batches.hits),
        np.ascontiguousarray(batches.mix),
        np.ascontiguousarray(weight, dtype=np.float64),
    )
    sizes, places = arrays[0].shape
    layer = _Layer(experts, places, sizes, 0, len(batches.mix), *(array.ctypes.data for array in arrays))
    return layer, list(arrays)


def _check(status: int) -> None:
    if status != 0:
        raise MemoryError("There is no memory left for the planner.")
