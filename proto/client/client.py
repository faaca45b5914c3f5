"""A coordinator's client for programs and notebooks; it may be used from many threads."""

import ipaddress
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypedDict, Unpack
from uuid import uuid4

import grpc

from moehive.proto import channel
from moehive.proto import inference_pb2 as pb
from moehive.proto import inference_pb2_grpc as rpc
from moehive.proto.handshake import VERSION_KEY

from .messages import generate_request, piece, plain
from .results import Completion, Model, MoehiveError, NodeStatus, Piece, Status, TierStatus

RESUME_SECONDS = 180.0  # without a token, before a stream that was cut is given up: a machine boots in less
RETRY_SECONDS = (0.1, 2.0)  # between attempts to resume: at first, and at most


class Options(TypedDict, total=False):
    """How to generate; what is left out (or None) takes the default in brackets."""

    model: str | None  # [the one that is served]
    request_id: str | None  # for cancel() [the client makes one]
    max_tokens: int | None  # >= 1 [what the context leaves]
    temperature: float | None  # 0 is greedy [1]
    top_k: int | None  # 0 is off [0]
    top_p: float | None  # in (0, 1] [1]
    min_p: float | None  # in [0, 1] [0]
    repetition_penalty: float | None  # in (0, 100] [1]
    presence_penalty: float | None  # in [-2, 2] [0]
    frequency_penalty: float | None  # in [-2, 2] [0]
    seed: int | None  # same seed, same text [a random one]
    stop: Sequence[str] | None  # up to 16 strings that end the text and are not part of it [none]
    logprobs: int | None  # alternatives to report with each token, up to 20; 0 reports nothing [0]
    ignore_eos: bool | None  # go on after the end-of-text token [False]


class Client:
    """Talks to one coordinator.

    On loopback the channel is open; elsewhere it is TLS, which trusts `ca_file` (the cluster's CA, PEM) or, without
    one, the CAs of this machine. Every method raises MoehiveError with a sentence.
    """

    def __init__(self, address: str, *, api_key: str | None = None, ca_file: str | Path | None = None) -> None:
        """`address`: host:port. Nothing is sent before the first call."""
        self._address = address
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._channel = _open(address, ca_file)
        self._stub = rpc.InferenceStub(self._channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all calls and the connection."""
        self._channel.close()

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """The whole answer to a prompt, to messages (each with "role" and "content"), or to token ids.

        `timeout`: seconds for all of it. Options: see Options.
        """
        whole = Completion("", "", [], [], [], "", None)  # type: ignore[arg-type]  # the last piece has it
        for part in self.stream(prompt, messages=messages, token_ids=token_ids, timeout=timeout, **options):
            whole.request_id = part.request_id
            whole.text += part.text
            whole.token_ids += part.token_ids
            whole.logprobs += part.logprobs
            whole.top_logprobs += part.top_logprobs
            if part.finish_reason is not None and part.usage is not None:
                whole.finish_reason, whole.usage = part.finish_reason, part.usage
        return whole

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        token_ids: Sequence[int] | None = None,
        timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Generator[Piece, None, None]:
        """As generate, piece by piece. Leaving the loop early cancels the generation.

        A stream that is cut, also by the coordinator's death, goes on once it is back: no token is lost or repeated.
        That holds from when the coordinator has taken the request; one that finds nobody fails at once.
        """
        request = generate_request(prompt, messages, token_ids, options)
        request.request_id = request.request_id or uuid4().hex
        last, end = monotonic(), None if timeout is None else monotonic() + timeout
        pause, longest = RETRY_SECONDS
        taken = tail = False  # tail: the text after the last token has arrived
        with self._errors():
            while True:
                left = None if end is None else max(0.0, end - monotonic())
                call = self._stub.Generate(request, timeout=left, metadata=self._metadata)
                try:
                    for reply in call:
                        taken, last, pause = True, monotonic(), RETRY_SECONDS[0]
                        request.resume_after += len(reply.tokens)
                        if reply.text and not reply.tokens:
                            if tail:
                                continue
                            tail = True
                        yield piece(reply, request.logprobs > 0)
                    return
                except grpc.RpcError as error:
                    taken = taken or _was_taken(call, error)
                    if not taken or not _is_cut(error) or monotonic() - last > RESUME_SECONDS:
                        raise
                finally:
                    call.cancel()
                sleep(pause)
                pause = min(2 * pause, longest)

    def cancel(self, request_id: str) -> bool:
        """Ends a running generation within one step; False when there is none of this id."""
        with self._errors():
            request = pb.CancelRequest(request_id=request_id)
            return bool(self._stub.Cancel(request, metadata=self._metadata).found)

    def status(self) -> Status:
        """The cluster, its nodes and the load."""
        with self._errors():
            reply = self._stub.Status(pb.StatusRequest(), metadata=self._metadata)
        return plain(Status, reply, nodes=[_node_status(node) for node in reply.nodes])

    def models(self) -> list[Model]:
        """What the coordinator serves."""
        with self._errors():
            reply = self._stub.Models(pb.ModelsRequest(), metadata=self._metadata)
        return [plain(Model, model) for model in reply.models]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns gRPC's errors into ours."""
        try:
            yield
        except grpc.RpcError as error:
            raise MoehiveError(self._sentence(error), error.code().name) from error
        except ValueError as error:  # what gRPC raises on a closed channel
            raise MoehiveError(f"The client is closed ({error}); make a new one.", "CANCELLED") from error

    def _sentence(self, error: Any) -> str:
        details = error.details() or error.code().name
        from_coordinator = VERSION_KEY in dict(error.trailing_metadata() or ())
        if from_coordinator:
            return str(details)
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"{self._address} did not finish in time; give it a longer timeout."
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return (
                f"No coordinator answers at {self._address}, or the connection broke ({details}); "
                "start it, or correct the address."
            )
        return f"The call to {self._address} failed: {details}"


def _is_cut(error: Any) -> bool:
    """Whether an error means that the stream broke, and not that the request was refused."""
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return True
    from_coordinator = VERSION_KEY in dict(error.trailing_metadata() or ())
    return not from_coordinator and error.code() in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)


def _was_taken(call: Any, error: Any) -> bool:
    """Whether the coordinator had taken a request of which no token has come, and did not refuse it afterwards."""
    refused = VERSION_KEY in dict(error.trailing_metadata() or ())
    return not refused and VERSION_KEY in dict(call.initial_metadata() or ())


def _open(address: str, ca_file: str | Path | None) -> Any:
    options = channel.options(channel.MAX_CLIENT_BYTES)
    if ca_file is None and _is_loopback(address):
        return grpc.insecure_channel(address, options)
    trusted = None
    if ca_file is not None:
        try:
            trusted = Path(ca_file).read_bytes()
        except OSError as error:
            text = f"The CA certificate {ca_file} can't be read: {error.strerror}."
            raise MoehiveError(text, "INVALID_ARGUMENT") from error
        # A cluster's own CA names the coordinator, whatever address it has today.
        options.append(("grpc.ssl_target_name_override", channel.COORDINATOR_NAME))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(trusted), options)


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _node_status(node: pb.NodeStatus) -> NodeStatus:
    tiers = plain(TierStatus, node.tiers) if node.HasField("tiers") else None
    return plain(NodeStatus, node, tiers=tiers)
