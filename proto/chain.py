"""Requests that travel from node to node (experts.proto: ComputeRequest.chain), checked and passed on."""

from . import experts_pb2 as pb
from .bounds import BoundsError, host_port, node_name
from .tensors import Request, Routing, WireError, head_bytes, read_routing, write_routing
from .wire.messages import Buffer

MAX_CHAIN = 15  # nodes after the one that is asked
MAX_CHAIN_BYTES = 4 << 20  # of hidden states, in each of the pieces that are on their way together


def add_to_chain(request: pb.ComputeRequest, name: str, address: str, routing: Routing) -> None:
    """Has one more node answer with those that `request` names already; `routing` is of the same tokens."""
    write_routing(request.chain.add(node_name=name, address=address), routing)


def check_chain(whole: Request) -> None:
    """Checks the chain of a request that `read_request` has read. Raises WireError."""
    request = whole.head
    nodes = request.chain
    if len(nodes) > MAX_CHAIN or len({node.node_name for node in nodes}) != len(nodes):
        raise WireError(f"A chain has at most {MAX_CHAIN} nodes after the first, each once.")
    if request.reduction != pb.REDUCTION_PARTIAL_SUM:
        raise WireError("A chain answers with one sum: it needs REDUCTION_PARTIAL_SUM.")
    if len(whole.states) > MAX_CHAIN_BYTES:
        raise WireError(f"Hidden states of a chain are at most {MAX_CHAIN_BYTES} bytes.")
    for node in nodes:
        try:
            node_name(node.node_name)
            host_port(node.address)
        except BoundsError as error:
            raise WireError(f"A chain can't go on: {error}") from None
        read_routing(node, request.tokens)


def next_request(whole: Request) -> tuple[Buffer, ...]:
    """What the first node of a request's chain is asked, in pieces and without an id; no state is copied."""
    request = whole.head
    first, rest = request.chain[0], request.chain[1:]
    onward = pb.ComputeRequest(
        epoch=request.epoch,
        step=request.step,
        layer=request.layer,
        tokens=request.tokens,
        hidden_size=request.hidden_size,
        dtype=request.dtype,
        reduction=request.reduction,
        scales=request.scales,
        offsets=first.offsets,
        experts=first.experts,
        weights=first.weights,
        chain=rest,
    )
    return head_bytes(onward, len(whole.states)), whole.states


def check_chain_reply(reply: pb.ComputeReply, nodes: int) -> None:
    """Checks that a reply answers for `nodes` nodes after the one that gave it. Raises WireError."""
    if len(reply.chain_ns) != nodes:
        raise WireError(f"It answers for {len(reply.chain_ns)} nodes after it where {nodes} were asked.")
