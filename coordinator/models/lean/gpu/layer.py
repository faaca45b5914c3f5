"""One decoder layer on a GPU: its weights there, and what is launched for it, in two segments.

The first goes from the sums of the layer before to the choice of experts, or to the end of a layer without any; the
second is the shared expert, which runs while others compute the routed ones. A segment launches the same kernels on
the same memory each time, reads nothing back and decides nothing by a number: so it can be recorded.
"""

from collections.abc import Callable

import torch

from moehive.kernels.delta_net import DeltaNet
from moehive.kernels.gpu.attention import GpuAttention
from moehive.kernels.gpu.batch import DeviceBatch
from moehive.kernels.gpu.delta_net import GpuDeltaNet
from moehive.kernels.gpu.latent import GpuLatentAttention
from moehive.kernels.gpu.linear import GpuLinears
from moehive.kernels.gpu.rows import add_norm, gate, route
from moehive.kernels.layer import GatedMlp, Mixer, Router
from moehive.kernels.mla import Mla
from moehive.kernels.trunk_ops import AttentionLayer

from ..parts import Layer
from .step import GpuStep


class GpuLayer:
    """See above. Keeps nothing of the weights on the CPU."""

    def __init__(self, layer: Layer, eps: float, before: "GpuLayer | None", device: torch.device) -> None:
        """Moves the layer's weights. Raises PlanesError, or torch's OutOfMemoryError."""
        self._eps = eps
        self._before = before
        self._norm, self._mlp_norm = layer.attention_norm.to(device), layer.mlp_norm.to(device)
        self._mixer = _mixer(layer.attention.mixer, device)
        self._output = GpuLinears([layer.attention.mixer.output], device)
        self._router = None if layer.mlp.router is None else _GpuRouter(layer.mlp.router, device)
        self._mlp = None if layer.mlp.here is None else _GpuMlp(layer.mlp.here, device)

    @property
    def shares(self) -> bool:
        """Whether there is a second segment: an expert that all tokens take."""
        return self._router is not None and self._mlp is not None

    def mix(self, step: GpuStep) -> None:
        """The first segment."""
        self.add(self._before, step, self._norm)
        self._output(self._mixer(step.x, step.batch), step.mixed)
        half = step.device_sent if step.device_sent is not step.x else None
        add_norm(step.hidden, self._mlp_norm, self._eps, step.x, add=step.mixed, half=half)
        if self._router is None:
            self.share(step)
        else:
            self._router(step)
            step.hand_over()

    def share(self, step: GpuStep) -> None:
        """The second segment; in a layer without routed experts the end of the first."""
        if self._mlp is not None:
            self._mlp(step)

    def add(self, before: "GpuLayer | None", step: GpuStep, norm: torch.Tensor) -> None:
        """`step.x` = the norm of `step.hidden`, to which the sums of the layer `before` are added first."""
        add = more = share = None
        if before is not None:
            if before._router is not None:
                step.take_answer()
                add = step.added
            if before._mlp is not None:
                more = step.more
                share = step.share[:, 0] if before._mlp.weighed else None
        add_norm(step.hidden, norm, self._eps, step.x, add=add, more=more, share=share)

    def likely(self, step: GpuStep, tokens: int) -> torch.Tensor:
        """The router's logits f32 [tokens, experts] in main memory, were `step.hidden` this layer's already."""
        assert self._router is not None
        x = torch.empty_like(step.x)
        add_norm(step.hidden, self._mlp_norm, self._eps, x)
        return self._router.logits(x)[:tokens].cpu()


class _GpuRouter:
    """A router's matrix and how it chooses."""

    def __init__(self, router: Router, device: torch.device) -> None:
        self._layer = router.layer
        self._bias = None if router.layer.bias is None else router.layer.bias.to(device)
        self.logits = GpuLinears([router.weights], device)

    def __call__(self, step: GpuStep) -> None:
        """Fills the step's logits, ids and weights from `step.x`."""
        self.logits(step.x, step.device_logits)
        route(self._layer, self._bias, step.device_logits, step.device_ids, step.device_weights)


class _GpuMlp:
    """A gated MLP, and for a shared expert how much of it a token takes."""

    def __init__(self, mlp: GatedMlp, device: torch.device) -> None:
        self._up = GpuLinears([mlp.gate, mlp.up], device)
        self._down = GpuLinears([mlp.down], device)
        self._share = None if mlp.share is None else GpuLinears([mlp.share], device)
        self._activation = mlp.activation
        self.weighed = mlp.share is not None

    def __call__(self, step: GpuStep) -> None:
        """Fills `step.more`, and `step.share` before its sigmoid, from `step.x`."""
        rows = self._up(step.x)
        middle = torch.empty(len(rows), rows.shape[1] // 2, device=rows.device)
        gate(rows, self._activation, middle)
        self._down(middle, step.more)
        if self._share is not None:
            self._share(step.x, step.share)


_Mix = Callable[[torch.Tensor, DeviceBatch], torch.Tensor]  # f32 [T, width] → f32 [T, what the output layer takes]


def _mixer(mixer: Mixer, device: torch.device) -> _Mix:
    """A layer's way to mix tokens, without its output layer."""
    projections = GpuLinears(mixer.projections, device)
    if isinstance(mixer.owner, AttentionLayer):
        attention = GpuAttention(mixer.owner, mixer.group, device)
        return lambda x, batch: attention(projections(x), batch)
    if isinstance(mixer.owner, DeltaNet):
        net = GpuDeltaNet(mixer.owner.layer, mixer.states, device)
        return lambda x, batch: net(projections(x), batch)
    assert isinstance(mixer.owner, Mla) and mixer.queries is not None
    return _latent(mixer, GpuLatentAttention(mixer.owner.layer, mixer.group, device), projections, device)


def _latent(mixer: Mixer, attention: GpuLatentAttention, projections: GpuLinears, device: torch.device) -> _Mix:
    """Latent attention, whose queries come from the hidden states or from a latent of their own."""
    assert mixer.queries is not None
    queries = GpuLinears([mixer.queries], device)
    if mixer.query_norm is None:
        return lambda x, batch: attention(queries(x), projections(x), batch)
    norm, width, eps = mixer.query_norm.to(device), mixer.queries.columns, mixer.query_eps

    def mix(x: torch.Tensor, batch: DeviceBatch) -> torch.Tensor:
        first = projections(x)
        latent = first[:, :width].contiguous()
        add_norm(latent, norm, eps, latent)
        return attention(queries(latent), first[:, width:], batch)

    return mix
