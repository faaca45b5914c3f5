"""Moehive's Python client: gRPC and nothing heavy.

from moehive.client import Client

with Client("127.0.0.1:50051") as client:
    print(client.generate("The capital of France is", max_tokens=24, temperature=0).text)
"""

from .client import Client, Options
from .results import Completion, Model, MoehiveError, NodeStatus, Piece, Status, TierStatus, TopLogprob, Usage

__all__ = [
    "Client",
    "Completion",
    "Model",
    "MoehiveError",
    "NodeStatus",
    "Options",
    "Piece",
    "Status",
    "TierStatus",
    "TopLogprob",
    "Usage",
]
