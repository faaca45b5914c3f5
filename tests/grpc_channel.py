"""gRPC's own channel to a member of a cluster, which speaks as the wire's does: a client that we did not write."""

import grpc
import grpc.aio

from moehive.proto.channel import MAX_MESSAGE_BYTES, Identity, options


def open_channel(address: str, identity: Identity, server_name: str) -> grpc.aio.Channel:
    """A mutual-TLS channel to `address` (host:port), whose certificate must be for `server_name`."""
    credentials = grpc.ssl_channel_credentials(identity.ca_pem, identity.key_pem, identity.chain_pem)
    override = [("grpc.ssl_target_name_override", server_name)]
    return grpc.aio.secure_channel(address, credentials, options=options(MAX_MESSAGE_BYTES) + override)
