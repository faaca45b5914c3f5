"""Certificates: who gets one, what it is good for, and that nothing else opens a channel."""

import asyncio
import stat
from datetime import UTC, datetime, timedelta

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from grpc_channel import open_channel

from moehive.coordinator.cluster import records
from moehive.coordinator.cluster.trust import LIFE, Authority
from moehive.coordinator.types import CoordinatorError
from moehive.proto import channel, cluster_pb2_grpc
from moehive.proto import cluster_pb2 as pb
from moehive.proto.bounds import BoundsError
from moehive.proto.channel import COORDINATOR_NAME, Identity, node_dns_name
from moehive.proto.handshake import PROTOCOL_KEY, VERSION_KEY, metadata, software_version

KNOCK = pb.SliceRequest(fingerprint="ab" * 32, experts=[pb.ExpertWanted()])


def names_of(chain_pem):
    certificate = x509.load_pem_x509_certificate(chain_pem)
    return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def der(identity):
    return x509.load_pem_x509_certificates(identity.chain_pem)[0].public_bytes(serialization.Encoding.DER)


def knock(cluster, make_identity, server_name=COORDINATOR_NAME):
    """The status that a fetch gets with the identity that `make_identity(harness)` returns."""

    async def main():
        async with cluster() as harness:
            identity = make_identity(harness)
            async with open_channel(harness.cluster_address, identity, server_name) as opened:
                call = cluster_pb2_grpc.ClusterStub(opened).FetchSlice(KNOCK, metadata=metadata(), timeout=10.0)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in call:
                        pass
                return caught.value.code(), caught.value.details()

    return asyncio.run(main())


def node_identity(authority, csr, name="attic"):
    key, request = csr()
    return Identity(key, authority.issue_node(name, request)[0], authority.ca_pem)


def test_a_certificate_of_another_cluster_opens_nothing(cluster, csr, tmp_path):
    def foreign(harness):
        theirs = node_identity(Authority.create(tmp_path / "other"), csr)
        return Identity(theirs.key_pem, theirs.chain_pem, harness.authority.ca_pem)

    assert knock(cluster, foreign)[0] == grpc.StatusCode.UNAVAILABLE


def test_no_certificate_opens_nothing(cluster):
    async def main():
        async with cluster() as harness:
            credentials = grpc.ssl_channel_credentials(harness.authority.ca_pem)
            override = [("grpc.ssl_target_name_override", COORDINATOR_NAME)]
            async with grpc.aio.secure_channel(harness.cluster_address, credentials, options=override) as opened:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await cluster_pb2_grpc.ClusterStub(opened).Drain(pb.DrainRequest(), timeout=10.0)
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE

    asyncio.run(main())


def test_an_expired_certificate_opens_nothing(cluster, csr, tmp_path):
    def expired(harness):
        long_ago = datetime.now(UTC) - LIFE - timedelta(minutes=1)
        return node_identity(Authority.load(tmp_path / "state" / "ca", lambda: long_ago), csr)

    assert knock(cluster, expired)[0] == grpc.StatusCode.UNAVAILABLE


def test_a_clock_that_is_hours_behind_still_accepts_a_new_certificate(cluster, csr, tmp_path, hand_node):
    async def main():
        async with cluster() as harness:
            soon = datetime.now(UTC) + timedelta(hours=20)  # the coordinator's clock, seen from this machine's
            authority = Authority.load(tmp_path / "state" / "ca", lambda: soon)
            node = hand_node("attic", node_identity(authority, csr), harness.cluster_address)
            harness.nodes.append(node)
            await node.attend()
            assert (await node.hear_assign()).epoch == 1

    asyncio.run(main())


def test_a_slow_link_is_given_time_for_its_handshake(cluster, hand_node, csr):
    """Every packet takes 0.3 s: a handshake takes longer than a first retry waits."""

    async def pump(reader, writer):
        while data := await reader.read(1 << 16):
            await asyncio.sleep(0.3)
            writer.write(data)
        writer.close()

    async def main():
        async with cluster() as harness:
            attic = await harness.join("attic")

            async def relay(reader, writer):
                onward = await asyncio.open_connection("127.0.0.1", harness.server.cluster_port)
                await asyncio.gather(pump(reader, onward[1]), pump(onward[0], writer))

            link = await asyncio.start_server(relay, "127.0.0.1", 0)
            port = link.sockets[0].getsockname()[1]
            node = hand_node("attic", attic.identity, f"127.0.0.1:{port}")
            reply = await node.stub.Renew(pb.RenewRequest(csr_der=csr()[1]), metadata=metadata(), timeout=15.0)
            assert reply.certificate_pem
            await node.close()
            link.close()

    asyncio.run(main())


@pytest.mark.parametrize("role", ["coordinator", "server", "two nodes"])
def test_a_certificate_of_another_role_is_not_a_nodes(cluster, role):
    def other(harness):
        authority = harness.authority
        if role == "coordinator":
            return authority.issue_coordinator()
        hosts = ["localhost"] if role == "server" else [node_dns_name("a"), node_dns_name("b")]
        return authority.issue_server(hosts)

    assert knock(cluster, other)[0] == grpc.StatusCode.PERMISSION_DENIED


def test_a_node_cannot_pose_as_the_coordinator(cluster, csr, tmp_path):
    async def main():
        authority = Authority.create(tmp_path / "ca")
        node = node_identity(authority, csr)
        server = grpc.aio.server()
        shown = [(node.key_pem, node.chain_pem)]
        credentials = grpc.ssl_server_credentials(shown, node.ca_pem, require_client_auth=True)
        port = channel.bind(server, "127.0.0.1", 0, credentials)
        await server.start()
        victim = node_identity(authority, csr, "victim")
        async with open_channel(f"127.0.0.1:{port}", victim, COORDINATOR_NAME) as opened:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await cluster_pb2_grpc.ClusterStub(opened).Drain(pb.DrainRequest(), timeout=10.0)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        await server.stop(0)

    asyncio.run(main())


def test_a_revoked_node_is_shut_out_until_it_joins_again(cluster):
    async def main():
        async with cluster() as harness:
            node = await harness.join("attic")
            records.revoke_node(harness.store, "attic")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await node.stub.Drain(pb.DrainRequest(node_name="attic"), metadata=metadata())
            assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
            assert "shut out" in caught.value.details()
            again = await harness.join("attic")
            await again.attend()
            assert (await again.hear_assign()).epoch == 1
            with pytest.raises(CoordinatorError, match="No node named 'ghost'"):
                records.revoke_node(harness.store, "ghost")

    asyncio.run(main())


def test_a_certificate_that_expired_on_an_open_channel_is_not_renewed(cluster, csr):
    async def main():
        async with cluster() as harness:
            node = await harness.join("attic")
            await node.stub.Renew(pb.RenewRequest(csr_der=csr()[1]), metadata=metadata())
            later = datetime.now(UTC) + LIFE + timedelta(minutes=1)
            harness.authority._clock = lambda: later
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await node.stub.Renew(pb.RenewRequest(csr_der=csr()[1]), metadata=metadata())
            assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
            assert "expired" in caught.value.details()

    asyncio.run(main())


@pytest.mark.parametrize("sent", [((PROTOCOL_KEY, "999"), (VERSION_KEY, "9.9.9")), ()])
def test_another_version_is_told_both_versions_by_every_method(cluster, sent):
    async def main():
        async with cluster() as harness:
            node = await harness.join("attic")
            stub = node.stub
            ca = grpc.ssl_channel_credentials(harness.authority.ca_pem)
            override = [("grpc.ssl_target_name_override", COORDINATOR_NAME)]
            async with grpc.aio.secure_channel(harness.server.join_address, ca, options=override) as opened:
                enrollment = cluster_pb2_grpc.EnrollmentStub(opened)
                calls = [
                    lambda: enrollment.Join(pb.JoinRequest(), metadata=sent, timeout=10.0),
                    lambda: stub.Renew(pb.RenewRequest(), metadata=sent, timeout=10.0),
                    lambda: stub.Drain(pb.DrainRequest(), metadata=sent, timeout=10.0),
                    lambda: stub.FetchSlice(KNOCK, metadata=sent, timeout=10.0).read(),
                    lambda: stub.Attend(metadata=sent, timeout=10.0).read(),
                ]
                for call in calls:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await call()
                    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
                    theirs = "9.9.9 (protocol 999)" if sent else "an unknown version (protocol none)"
                    assert theirs in caught.value.details()
                    assert f"this machine runs moehive {software_version()}" in caught.value.details()

    asyncio.run(main())


def test_an_authority_is_private_and_never_replaced(tmp_path):
    made = Authority.create(tmp_path / "state" / "ca")
    folder = tmp_path / "state" / "ca"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {
        "ca.key": 0o600,
        "ca.crt": 0o600,
    }
    assert list((tmp_path / "state").iterdir()) == [folder]  # nothing half-written is left
    with pytest.raises(CoordinatorError, match="already"):
        Authority.create(folder)
    assert Authority.load(folder).fingerprint == made.fingerprint
    assert list((tmp_path / "state").iterdir()) == [folder]


def test_an_authority_that_is_missing_or_damaged_is_one_sentence(tmp_path):
    with pytest.raises(CoordinatorError, match="Run `moehive init`"):
        Authority.load(tmp_path / "ca")
    Authority.create(tmp_path / "ca")
    Authority.create(tmp_path / "other")
    key = tmp_path / "ca" / "ca.key"
    good = key.read_bytes()
    key.write_bytes(good[: len(good) // 2])
    with pytest.raises(CoordinatorError, match="damaged"):
        Authority.load(tmp_path / "ca")
    key.write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    with pytest.raises(CoordinatorError, match="do not belong together"):
        Authority.load(tmp_path / "ca")
    (tmp_path / "file").touch()
    with pytest.raises(CoordinatorError, match="can't be written"):
        Authority.create(tmp_path / "file" / "ca")


def test_what_certificates_say(tmp_path, csr):
    authority = Authority.create(tmp_path / "ca")
    assert names_of(authority.issue_coordinator().chain_pem).get_values_for_type(x509.DNSName) == [COORDINATOR_NAME]
    server = names_of(authority.issue_server(["hive.example", "192.0.2.7", "::1"]).chain_pem)
    assert server.get_values_for_type(x509.DNSName) == ["hive.example"]
    assert [str(ip) for ip in server.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "::1"]
    chain, expires = authority.issue_node("attic", csr("whoever")[1])
    node, ca = x509.load_pem_x509_certificates(chain)
    assert names_of(chain).get_values_for_type(x509.DNSName) == [node_dns_name("attic")]
    assert node.not_valid_after_utc == expires
    assert expires - node.not_valid_before_utc == LIFE + timedelta(days=1)
    assert node.subject.rfc4514_string() == "CN=attic"
    node.verify_directly_issued_by(ca)
    assert not node.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize(
    "make",
    [
        lambda: ed25519.Ed25519PrivateKey.generate(),
        lambda: ec.generate_private_key(ec.SECP384R1()),
        lambda: rsa.generate_private_key(65537, 1024),
    ],
)
def test_keys_that_are_not_taken(tmp_path, make):
    from cryptography.hazmat.primitives import hashes, serialization

    key = make()
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, algorithm)
    with pytest.raises(BoundsError, match="must be P-256, or RSA"):
        Authority.create(tmp_path / "ca").issue_node("attic", csr.public_bytes(serialization.Encoding.DER))


def test_requests_that_are_not_granted(tmp_path, csr):
    authority = Authority.create(tmp_path / "ca")
    good = csr()[1]
    authority.issue_node("attic", good)
    forged = bytearray(good)
    forged[-5] ^= 1  # in the signature
    for wrong, sentence in [
        (b"", "0 bytes"),
        (b"x" * 9000, "9000 bytes"),
        (good[:-1], "not a valid"),
        (b"\x30\x80", "not a valid"),
        (bytes(forged), "not signed with the key|not a valid"),
    ]:
        with pytest.raises(BoundsError, match=sentence):
            authority.issue_node("attic", wrong)


def test_an_identity_is_made_again_when_a_third_of_its_life_is_left(tmp_path):
    now = datetime.now(UTC)
    authority = Authority.create(tmp_path / "ca", lambda: now)
    current = authority.renewing(authority.issue_coordinator)
    first = current()
    now += LIFE * 2 / 3 - timedelta(minutes=1)
    assert current() is first
    now += timedelta(minutes=2)
    second = current()
    assert second is not first
    assert current() is second
    assert not authority.expired(der(first))
    now += LIFE / 3
    assert authority.expired(der(first))
    assert not authority.expired(der(second))


def test_hosts_that_cannot_be(tmp_path):
    authority = Authority.create(tmp_path / "ca")
    with pytest.raises(CoordinatorError, match="at least one"):
        authority.issue_server([])
    with pytest.raises(CoordinatorError, match="neither a host name nor an IP address"):
        authority.issue_server(["a..b"])
