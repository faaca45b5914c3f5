"""Whether a model fits a cluster, in which format, and how fast it would be: an estimate's parts put together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moehive.kernels.geometry import Format

from ..settings import SettingsError
from ..sizes import in_bytes
from .advice import Advice, advise
from .cautions import warn
from .cluster import Cluster
from .constants import COORDINATOR_BYTES, NODE_BYTES
from .holding import Placed, hold
from .mixture import within
from .model import CHOICES, Model
from .step import Step, decode_step, load_seconds, prefill_rate


@dataclass(frozen=True, slots=True)
class FormatSize:
    """A format that the model could be in: bytes, whether the cluster holds it, and how many are read from disks."""

    format: str
    total_bytes: int
    fits: bool
    read_bytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """The answer. Without a place for everything, speeds are those of what a cluster with that memory would do."""

    model: Model
    cluster: Cluster
    placed: Placed
    step: Step
    prefill_tokens_per_s: float
    load_s: float
    formats: tuple[FormatSize, ...]
    advice: tuple[Advice, ...]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether everything has a place, on a disk if need be."""
        return self.placed.fits

    @property
    def decode_tokens_per_s(self) -> float:
        """Of one sequence."""
        return 1 / self.step.seconds

    def row(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            "model": self.model.name,
            "format": self.model.format,
            "mixture": dict(self.model.mixture),
            "fits": self.fits,
            "total_bytes": self.model.total_bytes,
            "expert_bytes": self.model.expert_bytes,
            "trunk_bytes": self.model.trunk_bytes,
            "active_expert_bytes": self.model.active_expert_bytes,
            "trunk_bytes_a_token": self.model.trunk_bytes_a_token,
            "parts": {**self.model.part_bytes(), "routed experts": self.model.expert_bytes},
            "missing_bytes": self.placed.missing_bytes + self.placed.missing_trunk_bytes,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "load_s": self.load_s,
            "token_s": {"trunk": self.step.trunk_s, "experts": self.step.experts_s, "hop": self.step.hop_s},
            "nodes": [
                {
                    "name": holding.machine.name,
                    "coordinator": holding.machine.coordinator,
                    "trunk_bytes": holding.trunk_bytes,
                    "kv_bytes": holding.kv_bytes,
                    "process_bytes": COORDINATOR_BYTES if holding.machine.coordinator else NODE_BYTES,
                    "ram_bytes": holding.ram_bytes,
                    "disk_bytes": holding.disk_bytes,
                    "vram_bytes": holding.vram_bytes,  # of those in RAM and on disk
                }
                for holding in self.placed.holdings
            ],
            "formats": [
                {"format": f.format, "total_bytes": f.total_bytes, "fits": f.fits, "read_bytes": f.read_bytes}
                for f in self.formats
            ],
            "advice": [
                {"what": a.what, "decode_tokens_per_s": a.decode_tokens_per_s, "fits": a.fits} for a in self.advice
            ],
            "warnings": list(self.warnings),
        }


def estimate(
    models: Mapping[str, Model],
    cluster: Cluster,
    budget: int | None = None,
    format: Format | str | None = None,
    mixed: Iterable[Format] = CHOICES,
) -> Estimate:
    """The estimate for one of `models` (by format, the best first): the best that memory holds.

    `budget`: bytes that the whole model may have, which a conversion fills (mixture.py) that chooses among `mixed`.
    `format` takes that one, whether it fits or not. Without either, where no format fits into memory, the one of
    which least lies on disks is answered for, and the smallest where none fits at all. Raises SettingsError when
    `format` is none of them.
    """
    if format is not None and format not in models:
        raise SettingsError(f"The model is not to be had in {format}; it is in {', '.join(models)}.")
    placed = {name: hold(model, cluster) for name, model in models.items()}
    sizes = tuple(
        FormatSize(
            name,
            model.total_bytes,
            placed[name].fits and (budget is None or model.total_bytes <= budget),
            placed[name].read_bytes,
        )
        for name, model in models.items()
    )
    if budget is not None and format is None:
        model = within(models, budget, mixed)
        where = hold(model, cluster)
    else:
        chosen = str(format) if format is not None else _choose(sizes)
        model, where = models[chosen], placed[chosen]
    step = decode_step(model, cluster, where)
    warnings = warn(model, cluster, where)
    if budget is not None and model.total_bytes > budget:
        warnings.insert(
            0,
            f"No format keeps within the budget of {in_bytes(budget)}; the smallest takes "
            f"{in_bytes(model.total_bytes)}."
            if format is None
            else f"In {format} the model takes {in_bytes(model.total_bytes)}, more than the budget.",
        )
    return Estimate(
        model,
        cluster,
        where,
        step,
        prefill_rate(model, cluster, where),
        load_seconds(cluster, where, model.trunk_bytes),
        sizes,
        tuple(advise(model, models, cluster)),
        tuple(warnings),
    )


def in_all_formats(model: Model) -> dict[str, Model]:
    """The model in each format that an estimate chooses among, the best first."""
    return {format: model.in_format(format) for format in CHOICES}


def _choose(sizes: Sequence[FormatSize]) -> str:
    """The best that fits into memory; else the one of which least lies on disks; else the smallest."""
    fitting = [size for size in sizes if size.fits]
    in_memory = [size for size in fitting if not size.read_bytes]
    if in_memory:
        return in_memory[0].format
    if fitting:
        return min(fitting, key=lambda size: size.read_bytes).format
    return min(sizes, key=lambda size: size.total_bytes).format
