"""Whether a trunk goes to this machine's GPU: when there is one, it knows the weights' formats, and has the room."""

from moehive.kernels.gpu.from_blob import linear_bytes
from moehive.kernels.gpu.planes import PlanesError
from moehive.kernels.linear import LinearWeights
from moehive.kernels.mla import Mla

from ..parts import Parts

# Of a GPU's memory, for what a pass of many tokens computes with (the scores of 128 heads, above all), for recorded
# graphs and for the libraries.
WORK_BYTES = 3 << 29
LEAST_TOKENS = 32_768  # of sequences that must have room for their caches, if fewer bytes are not asked for


class NoGpu(Exception):
    """Why the trunk does not run on a GPU; the text is one sentence."""


def cache_room(parts: Parts, kv_bytes: int, free_bytes: int) -> int:
    """Bytes that a GPU with `free_bytes` has for caches, beside the trunk; raises NoGpu if they are too few.

    They may be fewer than `kv_bytes`, the bound that was asked for, but enough for one sequence of LEAST_TOKENS. The
    last slab of pages of each size, which may be all but empty, is counted beside them.
    """
    try:
        weights = weight_bytes(parts)
    except PlanesError as error:
        raise NoGpu(str(error)) from error
    tokens = min(parts.context_length, LEAST_TOKENS)
    wanted = min(kv_bytes, parts.cache.nbytes(tokens, tokens))
    work = WORK_BYTES + parts.cache.slab_bytes
    room = free_bytes - weights - work
    if room < wanted:
        raise NoGpu(
            f"The trunk takes {weights / 1e9:.1f} GB, its caches {wanted / 1e9:.1f} GB and its work "
            f"{work / 1e9:.1f} GB; the GPU has {free_bytes / 1e9:.1f} GB free."
        )
    return min(kv_bytes, room)


def weight_bytes(parts: Parts) -> int:
    """Bytes of GPU memory that a trunk's weights take. Raises PlanesError for a format without a GPU kernel."""
    total = linear_bytes(parts.head) + parts.norm.nbytes
    for layer in parts.layers:
        mixer, mlp, router = layer.attention.mixer, layer.mlp.here, layer.mlp.router
        found: list[LinearWeights | None] = [*mixer.projections, mixer.output, mixer.queries]
        if mlp is not None:
            found += [mlp.gate, mlp.up, mlp.down, mlp.share]
        if router is not None:
            found.append(router.weights)
        total += sum(linear_bytes(one) for one in found if one is not None)
        total += layer.attention_norm.nbytes + layer.mlp_norm.nbytes
        if isinstance(mixer.owner, Mla):
            total += mixer.owner.layer.up.nbytes
    return total
