"""gRPC between the machines of a cluster, straight on the event loop's transports.

What travels is gRPC over HTTP/2 (RFC 9113, and gRPC's own "gRPC over HTTP2"), which any gRPC library can talk to.
A layer's way to a node and back is one small message each way, and there is one for each layer of each token: gRPC's
Python stack takes longer over it than the wire and the arithmetic together, which is why the cluster's own streams go
without it (docs/benchmarks.md). Mutual TLS only but for tests and benchmarks, no compression.

frames.py, messages.py: how bytes are cut; connection.py, stream.py: one connection and what goes on on it; reader.py,
sender.py: what comes and what goes; serving.py: the messages that native code takes; transport.py: the socket below;
server.py, channel.py: its two ends; tls.py: whom they trust.
"""
