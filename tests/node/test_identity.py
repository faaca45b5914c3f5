"""Joining, coming back, renewing; and what a person reads when the token or the certificate is no good."""

import asyncio
import socket
import ssl
import stat
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from moehive.coordinator.cluster import tokens
from moehive.coordinator.cluster.trust import Authority
from moehive.expert_node import identity as identity_module
from moehive.expert_node.identity import obtain
from moehive.expert_node.types import ConfigError, NodeError
from moehive.proto.bounds import host_port
from moehive.proto.join_token import JoinToken, parse


def test_join_then_restart(tmp_path, coordinator_class, authority, model):
    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        token = parse(coordinator.token())
        joined = await obtain(tmp_path / "n", token, "box", "host")
        assert joined.name == "box" and host_port(joined.cluster_address)[1] == coordinator.server.cluster_port
        folder = tmp_path / "n/identity"
        assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
        key = (folder / "key.pem").read_bytes()

        for word in (None, token, parse(coordinator.token())):  # none, the used one, a new one: all the same
            again = await obtain(tmp_path / "n", word, None, "host")
            assert again.name == "box" and again.current() == joined.current()
        assert (folder / "key.pem").read_bytes() == key
        with pytest.raises(ConfigError, match="belongs to the node box"):
            await obtain(tmp_path / "n", None, "other", "host")
        await coordinator.stop()

    asyncio.run(main())


def test_useless_tokens(tmp_path, coordinator_class, authority, model, free_port):
    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        token = parse(coordinator.token())
        await obtain(tmp_path / "first", token, "first", "host")

        async def problem(word):
            with pytest.raises(NodeError) as error:
                await obtain(tmp_path / "n", word, "n", "host")
            return str(error.value)

        assert "was used before" in await problem(token)
        assert "knows no such join token" in await problem(JoinToken(token.address, bytes(16), token.fingerprint))
        assert "different cluster" in await problem(JoinToken(token.address, token.secret, "0" * 64))
        away = JoinToken(f"127.0.0.1:{free_port}", token.secret, token.fingerprint)
        assert "No coordinator answers" in await problem(away)
        members = JoinToken(f"127.0.0.1:{coordinator.server.cluster_port}", token.secret, token.fingerprint)
        assert "not as one that lets nodes join" in await problem(members)
        expired = tokens.create_token(coordinator.store, token.address, token.fingerprint, ttl=1e-6)
        assert "expired" in await problem(expired)
        assert "`moehive token`" in await problem(None)
        assert not (tmp_path / "n/identity/certificate.pem").exists()
        await coordinator.stop()

    asyncio.run(main())


def test_a_token_of_another_cluster_joins_that_one(tmp_path, coordinator_class, authority, model):
    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        await obtain(tmp_path / "n", parse(coordinator.token()), "box", "host")
        await coordinator.stop()
        other = Authority.create(tmp_path / "other")
        coordinator = await coordinator_class.start(tmp_path / "c2", model, other)
        joined = await obtain(tmp_path / "n", parse(coordinator.token()), None, "host")
        assert joined.name == "box" and joined.current().ca_pem == other.ca_pem
        await coordinator.stop()

    asyncio.run(main())


def test_expired_certificate(tmp_path, coordinator_class, authority, model, monkeypatch):
    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=31)

    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        known = await obtain(tmp_path / "n", parse(coordinator.token()), "box", "host")
        known.check()
        monkeypatch.setattr(identity_module, "datetime", Later)
        for attempt in (known.check, None):
            with pytest.raises(NodeError, match=r"expired.*get a new token with `moehive token`"):
                attempt() if attempt else await obtain(tmp_path / "n", None, None, "host")
        await coordinator.stop()

    asyncio.run(main())


@pytest.mark.parametrize("name", ["certificate.pem", "ca.pem", "cluster.json", "key.pem"])
def test_damaged_state_is_one_sentence(tmp_path, coordinator_class, authority, model, name):
    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        await obtain(tmp_path / "n", parse(coordinator.token()), "box", "host")
        for content in (b"", b"\xff\x00nonsense", b"{}", authority.issue_coordinator().chain_pem):
            (tmp_path / "n/identity" / name).write_bytes(content)
            if name == "ca.pem" and content.startswith(b"-----"):
                continue
            with pytest.raises(NodeError, match="join again with a new token"):
                await obtain(tmp_path / "n", None, None, "host")
        await coordinator.stop()

    asyncio.run(main())


def presented(address, identity, tmp_path) -> x509.Certificate:
    """The certificate that a node's server shows now."""
    (tmp_path / "probe.pem").write_bytes(identity.key_pem + identity.chain_pem)
    context = ssl.create_default_context(cadata=identity.ca_pem.decode())
    context.check_hostname = False
    context.load_cert_chain(tmp_path / "probe.pem")
    with socket.create_connection(host_port(address), 10) as plain, context.wrap_socket(plain) as secured:
        return x509.load_der_x509_certificate(secured.getpeercert(binary_form=True))


def test_renewal_while_it_runs(tmp_path, coordinator_class, model, node_here, eventually):
    """With less than a third of its life left a certificate is renewed, and the running server shows the new one."""
    shift = timedelta(days=-22)
    authority = Authority.create(tmp_path / "ca", clock=lambda: datetime.now(UTC) + shift)

    async def main():
        nonlocal shift
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        token = coordinator.token()
        old = await obtain(tmp_path / "a", parse(token), "a", "host")
        before = x509.load_pem_x509_certificate(old.current().chain_pem)
        shift = timedelta()
        async with node_here(tmp_path / "a") as node:
            await coordinator.until_ready()
            await eventually(lambda: node._identity.current() != old.current())
            address = coordinator.membership.state.nodes["a"].capacity.address
            shown = await asyncio.to_thread(presented, address, authority.issue_coordinator(), tmp_path)
            assert shown.not_valid_after_utc > before.not_valid_after_utc + timedelta(days=20)
            assert shown.public_key() == before.public_key()
        again = await obtain(tmp_path / "a", None, None, "host")
        assert x509.load_pem_x509_certificate(again.current().chain_pem) == shown
        await coordinator.stop()

    asyncio.run(main())
