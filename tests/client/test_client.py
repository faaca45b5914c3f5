"""The thin client against a real server."""

import datetime
import ipaddress
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from moehive.client import Client, MoehiveError
from moehive.coordinator.serving.doors import Tls
from moehive.coordinator.types import NodeUnavailable
from moehive.proto.channel import COORDINATOR_NAME


@contextmanager
def connected(door: Any, **options: Any) -> Iterator[Client]:
    server = door.serve()
    with Client(f"127.0.0.1:{server.port}", **options) as client:
        yield client
    door.run(server.stop(0))
    assert door.engine.load().running == 0


def letters(door: Any, prompt: list[int], count: int) -> list[int]:
    history = list(prompt)
    for _ in range(count):
        history.append(int(door.fakes.next_logits(history, 27).argmax()))
    return history[len(prompt) :]


def test_generate_from_all_inputs(door: Any) -> None:
    with connected(door) as client:
        expected = letters(door, [1, 2, 3], 24)
        result = client.generate(
            token_ids=[1, 2, 3], max_tokens=24, temperature=0, logprobs=1, request_id="mine", ignore_eos=True
        )
        assert result.token_ids == expected
        assert result.text == "".join(chr(96 + token) for token in expected if token)
        assert len(result.logprobs) == 24 and all(logprob < 0 for logprob in result.logprobs)
        assert [top[0].token_id for top in result.top_logprobs] == expected
        assert [top[0].logprob for top in result.top_logprobs] == result.logprobs
        assert result.finish_reason == "length" and result.request_id == "mine"
        assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (3, 24)
        same = client.generate("abc", max_tokens=24, temperature=0, ignore_eos=True)
        assert same.text == result.text and same.logprobs == [] and same.top_logprobs == []
        chat = client.generate(
            messages=[{"role": "a", "content": "bc"}], max_tokens=24, temperature=0, ignore_eos=True
        )
        assert chat.text == result.text
        stopped = client.generate("abc", max_tokens=24, temperature=0, ignore_eos=True, stop=[result.text[2:4]])
        assert stopped.text == result.text[:2] and stopped.finish_reason == "stop"


def test_seed(door: Any) -> None:
    with connected(door) as client:
        texts = [client.generate("a", seed=seed, max_tokens=30, ignore_eos=True, top_k=20).text for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]


def test_stream_and_leave(door: Any) -> None:
    with connected(door) as client:
        pieces = list(client.stream("abc", max_tokens=5, temperature=0, ignore_eos=True))
        assert [token for piece in pieces for token in piece.token_ids] == letters(door, [1, 2, 3], 5)
        assert pieces[-1].finish_reason == "length" and pieces[-1].usage is not None
        with closing(client.stream("abc", max_tokens=900, ignore_eos=True)) as stream:  # type: ignore[type-var]
            next(stream)
        door.run(door.fakes.until(lambda: door.engine.load().running == 0))
        assert door.engine.load().generated_tokens < 900


def test_cancel_from_another_thread(door: Any) -> None:
    with connected(door) as client:
        door.experts.gate.clear()
        results: list[Any] = []
        thread = threading.Thread(
            target=lambda: results.append(client.generate("a", max_tokens=900, request_id="x", ignore_eos=True))
        )
        thread.start()
        door.run(door.fakes.until(lambda: door.engine.load().running == 1))
        assert client.cancel("x")
        thread.join(10)
        assert results[0].finish_reason == "cancelled" and results[0].token_ids == []
        assert not client.cancel("x")


def test_status_and_models(door: Any) -> None:
    with connected(door) as client:
        status = client.status()
        assert status.ready and status.model == "letters" and status.epoch == 2 and status.uptime_seconds == 2.0
        (node,) = status.nodes
        assert (node.name, node.state, node.address, node.experts_held) == ("a", "ready", "h:1", 12)
        (model,) = client.models()
        assert (model.id, model.vocabulary, model.experts_per_layer) == ("letters", 27, 4)


def test_errors_are_sentences(door: Any) -> None:
    with connected(door) as client:

        def refused(code: str, **arguments: Any) -> str:
            with pytest.raises(MoehiveError) as caught:
                client.generate(**arguments)
            assert caught.value.code == code
            return str(caught.value)

        assert "temperature is -1" in refused("INVALID_ARGUMENT", prompt="a", temperature=-1)
        assert "top_k can't be '-1'" in refused("INVALID_ARGUMENT", prompt="a", top_k=-1)
        assert "token_ids can't be" in refused("INVALID_ARGUMENT", token_ids=[-1])
        assert "max_tokens can't be 'many'" in refused("INVALID_ARGUMENT", prompt="a", max_tokens="many")
        assert "bogus can't be" in refused("INVALID_ARGUMENT", prompt="a", bogus=1)
        assert "one of prompt" in refused("INVALID_ARGUMENT")
        assert "one of prompt" in refused("INVALID_ARGUMENT", prompt="a", token_ids=[1])
        assert "empty" in refused("INVALID_ARGUMENT", token_ids=[])
        assert "'gpt' is not served" in refused("NOT_FOUND", prompt="a", model="gpt")
        door.experts.fail_at[door.experts.calls] = NodeUnavailable("b", "Node b is away; start it.")
        assert refused("UNAVAILABLE", prompt="a") == "Node b is away; start it."
        door.experts.gate.clear()
        assert "longer timeout" in refused("DEADLINE_EXCEEDED", prompt="a", timeout=0.2)
        door.experts.gate.set()
    with pytest.raises(MoehiveError, match="closed"):
        client.models()


def test_nobody_there() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(MoehiveError, match=r"No coordinator answers at 127.0.0.1:1"):
        client.status()
    with pytest.raises(MoehiveError, match="/nowhere can't be read: No such file"):
        Client("example.org:1", ca_file="/nowhere")


def certificate(directory: Path) -> Tls:
    """A certificate of its own CA for the coordinator's name."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName(COORDINATOR_NAME), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    tls = Tls(directory / "chain.pem", directory / "key.pem")
    tls.chain_file.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    tls.key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return tls


def test_tls_and_key(door: Any, tmp_path: Path) -> None:
    tls = certificate(tmp_path)
    server = door.serve(tls=tls, check_key=lambda key: key == "right")
    address = f"127.0.0.1:{server.port}"
    with Client(address, api_key="right", ca_file=tls.chain_file) as client:
        assert client.generate("abc", max_tokens=2, ignore_eos=True).usage.completion_tokens == 2
    with Client(address, api_key="wrong", ca_file=tls.chain_file) as client:
        with pytest.raises(MoehiveError, match="wants an API key") as caught:
            client.status()
        assert caught.value.code == "UNAUTHENTICATED"
    with Client(address, api_key="right") as client, pytest.raises(MoehiveError, match="No coordinator answers"):
        client.status()  # plain text to a TLS door
    door.run(server.stop(0))


def test_import_is_light() -> None:
    code = (
        "import sys, moehive.client\n"
        "heavy = {'torch', 'transformers', 'numpy', 'fastapi', 'pydantic'} & set(sys.modules)\n"
        "ours = [m for m in sys.modules if m.startswith(('moehive.coordinator', 'moehive.expert_node', "
        "'moehive.kernels'))]\n"
        "print(sorted(heavy) + ours)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
