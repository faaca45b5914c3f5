"""Joining: the token, the certificate that it buys, and everything that must not get in."""

import asyncio
import dataclasses

import grpc
import grpc.aio
import pytest

from moehive.proto import bootstrap, join_token
from moehive.proto import cluster_pb2 as pb
from moehive.proto.channel import node_dns_name


def test_a_node_joins_and_attends_under_the_name_in_its_certificate(cluster):
    async def main():
        async with cluster() as harness:
            node = await harness.join("attic")
            await node.attend()
            assert (await node.hear_assign()).epoch == 1
            assert list(harness.membership.state.nodes) == ["attic"]

    asyncio.run(main())


def test_the_token_survives_its_way_as_one_word(cluster):
    async def main():
        async with cluster() as harness:
            token = harness.token()
            assert join_token.parse(f"  {token}\n") == token
            assert len(str(token).split()) == 1

    asyncio.run(main())


def refused(cluster, tamper, name="attic", ttl=60.0):
    """The status of a join with a token that `tamper` made from a good one."""

    async def main():
        async with cluster() as harness:
            token = await tamper(harness)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await harness.try_join(token, name)
            return caught.value.code(), caught.value.details()

    return asyncio.run(main())


def test_a_wrong_token_is_refused(cluster):
    async def wrong(harness):
        return dataclasses.replace(harness.token(), secret=b"0123456789abcdef")

    code, sentence = refused(cluster, wrong)
    assert code == grpc.StatusCode.UNAUTHENTICATED
    assert "knows no such join token" in sentence


def test_a_used_token_is_refused_and_says_by_whom(cluster):
    async def used(harness):
        token = harness.token()
        await harness.try_join(token, "cellar")
        return token

    code, sentence = refused(cluster, used)
    assert code == grpc.StatusCode.UNAUTHENTICATED
    assert "used before, by node 'cellar'" in sentence


def test_an_expired_token_is_refused(cluster):
    async def expired(harness):
        token = harness.token(ttl=60.0)
        late = harness.store.clock() + 61.0
        harness.store.clock = lambda: late
        return token

    code, sentence = refused(cluster, expired)
    assert code == grpc.StatusCode.UNAUTHENTICATED
    assert "expired" in sentence


def test_a_token_is_not_spent_by_a_request_that_gets_no_certificate(cluster):
    async def main():
        async with cluster() as harness:
            token = harness.token()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await harness.try_join(token, "attic", csr=b"not a request")
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            await harness.try_join(token, "attic")

    asyncio.run(main())


def test_two_nodes_at_once_cannot_use_one_token(cluster):
    async def main():
        async with cluster() as harness:
            token = harness.token()
            results = await asyncio.gather(
                *(harness.try_join(token, f"node-{i}") for i in range(6)), return_exceptions=True
            )
            refusals = [r for r in results if isinstance(r, grpc.aio.AioRpcError)]
            assert len(refusals) == 5
            assert {r.code() for r in refusals} == {grpc.StatusCode.UNAUTHENTICATED}

    asyncio.run(main())


@pytest.mark.parametrize("name", ["", "UPPER", "-x", "x-", "a" * 64, "a.b", "ä", "coordinator"])
def test_a_name_that_cannot_be_is_refused(cluster, name):
    async def good(harness):
        return harness.token()

    code, _ = refused(cluster, good, name=name)
    assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ALREADY_EXISTS)


def test_the_name_of_a_node_that_is_here_is_taken(cluster):
    async def main():
        async with cluster() as harness:
            await harness.join_obedient("attic")
            await harness.until(lambda: harness.membership.state.ready)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await harness.try_join(harness.token(), "attic")
            assert caught.value.code() == grpc.StatusCode.ALREADY_EXISTS

    asyncio.run(main())


def test_another_cluster_at_the_tokens_address_is_told_apart(cluster):
    async def main():
        async with cluster() as harness:
            token = dataclasses.replace(harness.token(), fingerprint="0" * 64)
            with pytest.raises(bootstrap.BootstrapError, match="A different cluster answers at"):
                await harness.try_join(token, "attic")

    asyncio.run(main())


def test_nobody_at_the_tokens_address_is_one_sentence(free_port):
    with pytest.raises(bootstrap.BootstrapError, match=f"No coordinator answers at 127.0.0.1:{free_port}"):
        bootstrap.fetch_ca("127.0.0.1", free_port, "0" * 64, timeout=5.0)


def test_a_port_that_speaks_no_tls_is_one_sentence(cluster):
    async def main():
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(bootstrap.BootstrapError, match="No coordinator answers"):
            await asyncio.to_thread(bootstrap.fetch_ca, "127.0.0.1", port, "0" * 64, 5.0)
        server.close()

    asyncio.run(main())


def test_a_renewed_certificate_is_for_the_same_name_whatever_was_asked(cluster, csr):
    from cryptography import x509

    async def main():
        async with cluster() as harness:
            node = await harness.join("attic")
            _, request = csr("coordinator")
            reply = await node.stub.Renew(pb.RenewRequest(csr_der=request), metadata=_metadata())
            certificate = x509.load_pem_x509_certificate(reply.certificate_pem)
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert names.get_values_for_type(x509.DNSName) == [node_dns_name("attic")]

    asyncio.run(main())


def _metadata():
    from moehive.proto.handshake import metadata

    return metadata()


@pytest.mark.parametrize(
    "word",
    ["", "hello", "mh1.", "mh1.!!!!", "mh2.AAAA", "mh1." + "A" * 80, "mh1." + "A" * 5000, "mh1.ä", "mh1.A A"],
)
def test_garbage_is_not_a_token(word):
    with pytest.raises(join_token.TokenError):
        join_token.parse(word)


def test_every_single_wrong_character_is_found():
    word = str(join_token.JoinToken("host.example:8470", bytes(range(16)), "ab" * 32))
    for at in range(4, len(word)):
        for other in "Az":
            if word[at] != other:
                changed = word[:at] + other + word[at + 1 :]
                try:
                    assert join_token.parse(changed) == join_token.parse(word)  # spare bits of the last character
                    assert at == len(word) - 1
                except join_token.TokenError:
                    pass
    for end in range(len(word)):
        with pytest.raises(join_token.TokenError):
            join_token.parse(word[:end])
