"""The nouns that the coordinator's parts share; imports nothing of ours but the kernels' geometry."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import NamedTuple, NewType, TypeAlias

NodeName = NewType("NodeName", str)
LOCAL = NodeName("coordinator")  # the coordinator's own spare memory, a node without a hop


class CoordinatorError(Exception):
    """Something a person must know; its text is one sentence that says what is wrong and what to do."""


class NodeUnavailable(CoordinatorError):
    """An expert node that a request needs is away, silent or refuses."""

    def __init__(self, node: str, sentence: str) -> None:
        super().__init__(sentence)
        self.node = node


class InvalidRequest(CoordinatorError):
    """A client's request is out of bounds; `parameter` names what, as the client spelled it."""

    def __init__(self, sentence: str, parameter: str | None = None) -> None:
        super().__init__(sentence)
        self.parameter = parameter


class NoRoom(CoordinatorError):
    """The KV cache's memory bound leaves no room for this sequence now."""


class NotReady(CoordinatorError):
    """The cluster does not hold the whole model yet; the sentence says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. The order is penalties, temperature, top-k, top-p, min-p, draw."""

    temperature: float = 1.0  # >= 0; 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # in (0, 1]
    min_p: float = 0.0  # in [0, 1]: drop what is less likely than min_p times the likeliest
    repetition_penalty: float = 1.0  # > 0; divides positive logits of tokens seen, prompt included (CTRL)
    presence_penalty: float = 0.0  # in [-2, 2]; off the logits of tokens generated at least once
    frequency_penalty: float = 0.0  # in [-2, 2]; off the logits, times the number of occurrences
    seed: int | None = None  # None: a random one


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One generation, tokens in and tokens out; text is made at the edge (serving/text.py)."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None  # None: what the context leaves
    stop_tokens: frozenset[int] = frozenset()  # end-of-text ids
    logprobs: int = 0  # alternatives for each token; 0: no log-probabilities
    forced: tuple[int, ...] = ()  # the answer's first tokens, which an earlier run of the same request has made


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; `logprob` and `top` (id, log-probability) are of the model's own distribution."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Pins(NamedTuple):
    """Experts of a node's slice that stay in a tier: for each layer, ascending. The others move by use."""

    in_ram: tuple[tuple[int, ...], ...]
    in_vram: tuple[tuple[int, ...], ...]


# For each layer and each of its experts the nodes that hold it, the one to ask first in front.
Owners: TypeAlias = tuple[tuple[tuple[NodeName, ...], ...], ...]


@dataclass(frozen=True)  # no slots: `slices` is worked out once, on whatever thread asks first
class Plan:
    """Who holds what.

    An epoch numbers a plan; it grows by one with each new plan of a cluster, over restarts too. `pins` has the nodes
    that hold more than a fast tier has room for, where it is known what is used most.
    """

    epoch: int
    owners: Owners
    pins: Mapping[NodeName, Pins] = field(default_factory=dict, hash=False)

    @cached_property
    def slices(self) -> Mapping[NodeName, tuple[tuple[int, ...], ...]]:
        """For each node that holds anything: for each layer, the experts that it holds, ascending."""
        held: dict[NodeName, list[list[int]]] = {}
        for number, layer in enumerate(self.owners):
            for expert, nodes in enumerate(layer):
                for node in nodes:
                    if node not in held:
                        held[node] = [[] for _ in self.owners]
                    held[node][number].append(expert)
        return {node: tuple(map(tuple, layers)) for node, layers in held.items()}

    def slice_of(self, node: NodeName) -> tuple[tuple[int, ...], ...]:
        """For each layer, the experts that `node` holds, ascending."""
        return self.slices.get(node) or ((),) * len(self.owners)
