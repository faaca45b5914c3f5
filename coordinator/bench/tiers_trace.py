"""A made-up trace of routing for `moehive bench tiers`, and what it is like; docs/tiers.md says how real ones are."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

STATE = 48  # numbers of the routing model's state
SKEW, CARRY, ALONG, SHARPNESS = 0.5, 0.75, 0.95, 2.0  # popularity; correlation of tokens, of layers; of the scores
AHEAD = 2  # layers that are foreseen


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Scores are positive; a token's `top_k` experts are those with the highest."""

    scores: npt.NDArray[np.float32]  # [tokens, layers, experts]
    # [tokens, layers, AHEAD, experts]: those of the next layers, as a layer's state has them.
    ahead: npt.NDArray[np.float32]
    top_k: int

    def chosen(self) -> npt.NDArray[np.int64]:
        """Each token's experts in each layer, best first, [tokens, layers, top_k]."""
        return np.argsort(-self.scores, axis=-1)[..., : self.top_k]

    def recall(self) -> list[float]:
        """For each distance the share of a layer's experts that as many foreseen ones had among them."""
        chosen = _best(self.scores, self.top_k)
        return [
            float(
                (chosen[:, 1 + d :] & _best(self.ahead[:, : -1 - d, d], self.top_k)).sum() / chosen[:, 1 + d :].sum()
            )
            for d in range(AHEAD)
        ]

    def reuse(self) -> float:
        """Share of a layer's experts that the token before had asked for, too."""
        chosen = _best(self.scores, self.top_k)
        return float((chosen[1:] & chosen[:-1]).sum() / chosen[1:].sum())


def routing_trace(tokens: int, layers: int, experts: int, top_k: int, rng: np.random.Generator) -> Trace:
    """A token's state drifts from layer to layer; each layer's router and popularity of experts are random."""
    routers = rng.standard_normal((layers, experts, STATE)) / STATE**0.5
    popularity = rng.standard_normal((layers, experts)) * SKEW
    states = np.empty((tokens, layers, STATE))
    first = rng.standard_normal(STATE)
    for token in range(tokens):
        first = CARRY * first + (1 - CARRY**2) ** 0.5 * rng.standard_normal(STATE)
        state = first
        for layer in range(layers):
            state = ALONG * state + (1 - ALONG**2) ** 0.5 * rng.standard_normal(STATE)
            states[token, layer] = state
    scores = np.empty((tokens, layers, experts), dtype=np.float32)
    ahead = np.ones((tokens, layers, AHEAD, experts), dtype=np.float32)
    for layer in range(layers):
        for distance in range(min(layer, AHEAD) + 1):
            logits = states[:, layer - distance] @ routers[layer].T + popularity[layer]
            place = scores[:, layer] if distance == 0 else ahead[:, layer - distance, distance - 1]
            place[:] = np.exp(SHARPNESS * logits)
    return Trace(scores, ahead, top_k)


def _best(scores: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.bool_]:
    """Which of the last axis are among the `count` highest."""
    best = np.zeros(scores.shape, dtype=np.bool_)
    np.put_along_axis(best, np.argsort(-scores, axis=-1)[..., :count], True, axis=-1)
    return best


def policy_hit_rates(trace: Trace, room: int) -> dict[str, float]:
    """Hit rates over the trace's second half when `room` experts stay: those used last, or most, or fading counts."""
    # Tokens in which a count halves; both ends are this, too.
    half_lives = {
        "least recently used": 1 / trace.top_k / trace.scores.shape[1],
        "least frequently used": np.inf,
        "fading count": 16.0,
    }
    return {name: _hit_rate(trace, room, half_life) for name, half_life in half_lives.items()}


def _hit_rate(trace: Trace, room: int, half_life: float) -> float:
    tokens, layers, _ = trace.scores.shape
    chosen = trace.chosen()
    counts: dict[tuple[int, int], tuple[float, float]] = {}  # the count, and when it was that
    held: set[tuple[int, int]] = set()
    hits: int = 0
    for token, layer in np.ndindex(tokens, layers):
        now = token + layer / layers
        for expert in ((layer, int(number)) for number in chosen[token, layer]):
            hits += int(expert in held and 2 * token >= tokens)
            before = 2.0 ** max(-60.0, _worth(counts[expert], now, half_life)) if expert in counts else 0.0
            counts[expert] = (before + 1, now)
            if expert not in held and len(held) >= room:
                worths = [(_worth(counts[other], now, half_life), other) for other in held]
                held.remove(min(worths)[1])
            held.add(expert)
    return float(hits / ((tokens - tokens // 2) * layers * trace.top_k))


def _worth(count: tuple[float, float], now: float, half_life: float) -> float:
    """The logarithm of what is left of a count."""
    return float(np.log2(count[0]) - (now - count[1]) / half_life)
