"""Reads experts before their layer asks for them: those that a guess names, when such guesses come true often enough.

Guesses are the coordinator's, or what followed before (use.py). What is read for a layer is held until the layer's
request is there, and gives way when a request needs the room.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from .experts import DiskExpert
from .room import Room
from .use import LAGS, Chances, Guesses, Source, Transitions, place_of

AHEAD_SHARE = 4  # a prefetch may hold at most one part in so many of the RAM
AHEAD_LAYERS = 4  # for which it holds experts, the newest: two layers of each of two micro-batches, which take turns
CERTAIN, WORTH = 0.8, 0.3  # chances from which a guess is read before all others, and from which it is read at all
UNCERTAIN = 1 << 40  # due so much later
NOTED_EXPERTS = 64  # of one request: more are a prompt's, after which anything follows


Elsewhere = Callable[[int], Collection[int]]  # a layer's experts that are in memory above this tier


def nowhere(layer: int) -> Collection[int]:
    """There is none."""
    return ()


@dataclass(slots=True)
class Ahead:
    """Experts that are held for a layer that is yet to come."""

    experts: list[DiskExpert] = field(default_factory=list)
    nbytes: int = 0
    guesses: Guesses = field(default_factory=dict)


class Prefetcher:
    """Whoever calls holds the room's lock."""

    def __init__(self, room: Room, experts: Sequence[Mapping[int, DiskExpert]], layers: Sequence[int]) -> None:
        """`experts` that lie on disk now, by layer and number; `layers`: how many each layer of the model has."""
        self._room = room
        self._experts = experts
        self._transitions = Transitions(layers)
        self._chances = Chances()
        self._ahead: OrderedDict[int, Ahead] = OrderedDict()  # by layer, the newest last
        self._unnoted: list[tuple[int, Collection[int], Ahead | None]] = []  # layers, what they asked for

    @property
    def nbytes(self) -> int:
        """Bytes of the experts that are held."""
        return sum(ahead.nbytes for ahead in self._ahead.values())

    def prefetch(self, layer: int, likely: Sequence[Sequence[int]], chosen: int, elsewhere: Elsewhere) -> None:
        """See RamTier.prefetch."""
        for distance in range(1, max(LAGS, len(likely)) + 1):
            guess = likely[distance - 1] if distance <= len(likely) else ()
            source = bool(guess), distance
            if not guess:
                self.note()
                guess = self._transitions.likely(layer, distance)
            self._foresee(layer, source, guess, chosen, elsewhere)

    def came(self, layer: int) -> Ahead | None:
        """A layer's request is there: the end of what was held for it, which is returned."""
        ahead = self._ahead.pop(layer, None)
        if ahead is not None:
            self._passed(ahead)
        return ahead

    def asked(self, layer: int, experts: Collection[int], ahead: Ahead | None) -> None:
        """What a layer's request asked for, and what `came` returned; counted later, while the disk is waited for."""
        self.note()
        if len(experts) <= NOTED_EXPERTS:
            self._unnoted.append((layer, experts, ahead))

    def note(self) -> None:
        """Counts what the last requests asked for."""
        for layer, experts, ahead in self._unnoted:
            self._transitions.note(layer, experts)
            if ahead is not None:
                self._chances.note(ahead.guesses, experts)
        self._unnoted.clear()

    def give_way(self) -> bool:
        """Lets go of what is held for one layer, the newest; False when nothing is."""
        if not self._ahead:
            return False
        self._let_go(self._ahead.popitem()[1])
        return True

    def _foresee(self, layer: int, source: Source, guess: Sequence[int], chosen: int, elsewhere: Elsewhere) -> None:
        """Reads and holds what of a guess made at `layer` is worth it, in place of the last guess."""
        room = self._room
        layer = (layer + source[1]) % len(self._experts)
        known, due = self._experts[layer], room.requests + source[1]
        former = self._ahead.pop(layer, None)
        while len(self._ahead) >= AHEAD_LAYERS:
            self._passed(self._ahead.popitem(last=False)[1])
        left = room.capacity_bytes // AHEAD_SHARE - self.nbytes
        ahead = self._ahead[layer] = Ahead(guesses=former.guesses if former is not None else {})
        places = ahead.guesses[source] = []
        chances, there = self._chances.of(source), elsewhere(layer)
        for rank, number in enumerate(dict.fromkeys(guess)):
            expert = known.get(number)
            if expert is None or number in there:
                continue
            place = place_of(rank, chosen)
            places.append((number, place))
            if chances[place] < WORTH or ahead.nbytes + expert.nbytes > left:
                continue
            when = due if chances[place] >= CERTAIN else UNCERTAIN + due
            if expert.job is not None:
                room.hurry(expert, when)
            elif expert.weights is None:
                if not room.read(expert, when):
                    break
                expert.foreseen = True
                room.totals.prefetches += 1
            expert.held += 1
            ahead.experts.append(expert)
            ahead.nbytes += expert.nbytes
        if former is not None:
            self._let_go(former)

    def _passed(self, ahead: Ahead) -> None:
        """A layer's request is there, or never came: the end of what was foreseen for it."""
        self._let_go(ahead)
        for expert in ahead.experts:
            self._room.totals.unused += expert.foreseen
            expert.foreseen = False

    def _let_go(self, ahead: Ahead) -> None:
        """The end of what a prefetch held. What is not begun is taken out of line."""
        room = self._room
        for expert in ahead.experts:
            expert.held -= 1
            if not expert.held and not expert.pinned and room.cancel(expert):
                room.totals.prefetches -= expert.foreseen
                expert.foreseen = False
                room.reader.wake()
            room.may_leave(expert)
