"""Who this node is: its key, made here and never sent, and the certificate that the coordinator gave for it.

<state>/identity/key.pem           P-256, mode 0600
<state>/identity/ca.pem            the cluster's CA
<state>/identity/cluster.json      this node's name, host:port of the coordinator's Cluster service
<state>/identity/certificate.pem   the node's certificate, then the CA's; written last, so with it all is there
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

import grpc
import grpc.aio
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moehive.proto import bounds, cluster_pb2_grpc
from moehive.proto import cluster_pb2 as pb
from moehive.proto.bootstrap import BootstrapError, fetch_ca, open_join_channel
from moehive.proto.channel import Identity, node_dns_name
from moehive.proto.handshake import metadata
from moehive.proto.join_token import JoinToken

from .files import write_private
from .types import ConfigError, NodeError

log = logging.getLogger(__name__)

JOIN_SECONDS = 30.0
Renew: TypeAlias = Callable[[pb.RenewRequest], Awaitable[pb.RenewReply]]

RENEWAL_LEFT = 1 / 3  # of a certificate's life: with less than this left it is renewed


@dataclass(frozen=True, slots=True)
class Membership:
    """What is kept on disk of one cluster; a renewal makes a new one."""

    name: str
    cluster_address: str  # host:port
    identity: Identity
    not_before: datetime
    not_after: datetime
    fingerprint: str  # SHA-256 of the CA's certificate, hexadecimal

    def renewal_due(self, now: datetime) -> bool:
        """Whether less than RENEWAL_LEFT of the certificate's life is left."""
        return self.not_after - now <= (self.not_after - self.not_before) * RENEWAL_LEFT


# Of gRPC itself, whose words say nothing to a person; the join service has others.
_NO_JOIN_PORT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED)


class NodeIdentity:
    """The node's membership in a cluster, renewed while it runs. `current` may be called by any thread."""

    def __init__(self, folder: Path, membership: Membership) -> None:
        self._folder = folder
        self._membership = membership

    @property
    def name(self) -> str:
        return self._membership.name

    @property
    def cluster_address(self) -> str:
        """host:port of the coordinator's Cluster service."""
        return self._membership.cluster_address

    def current(self) -> Identity:
        """The key and the newest certificate."""
        return self._membership.identity

    def check(self) -> None:
        """Raises NodeError when the certificate has expired."""
        if datetime.now(UTC) >= self._membership.not_after:
            raise NodeError(
                f"This node's certificate expired on {self._membership.not_after:%Y-%m-%d}, by this machine's clock: "
                "set the clock if it is wrong, else get a new token with `moehive token` on the coordinator and "
                "start the node with --token."
            )

    async def renew_if_due(self, renew: Renew) -> None:
        """Asks for a new certificate for the same key when a third of the old one's life is left.

        Raises AioRpcError, and NodeError when the answer is no certificate for this node.
        """
        old = self._membership
        if not old.renewal_due(datetime.now(UTC)):
            return
        request = pb.RenewRequest(csr_der=_csr(_read_key(self._folder), old.name))
        reply = await renew(request)
        new = _membership(
            old.name, old.cluster_address, old.identity.key_pem, reply.certificate_pem, old.identity.ca_pem
        )
        await asyncio.to_thread(write_private, self._folder / "certificate.pem", reply.certificate_pem)
        self._membership = new
        log.info("The certificate was renewed; it is good until %s.", f"{new.not_after:%Y-%m-%d}")


async def obtain(state: Path, token: JoinToken | None, name: str | None, default_name: str) -> NodeIdentity:
    """This node's identity: the stored one if it is good, else a new one for the token.

    `name`: asked for by a person; must agree with a stored certificate. Raises NodeError.
    """
    folder = state / "identity"
    stored = await asyncio.to_thread(_load, folder)
    if stored is not None and (token is None or token.fingerprint == stored.fingerprint):
        known = NodeIdentity(folder, stored)
        if token is None:
            known.check()
        elif stored.not_after > datetime.now(UTC):
            log.info("This node is a member of the cluster already; the token is not needed and was not used.")
            token = None
        if token is None:
            if name not in (None, stored.name):
                raise ConfigError(
                    f"{state} belongs to the node {stored.name}: leave --name out, or choose another --state-dir."
                )
            return known
    if token is None:
        raise NodeError(
            f"{state} holds no certificate yet: get a token with `moehive token` on the coordinator and start the "
            "node with --token."
        )
    chosen = name or (stored.name if stored is not None else default_name)
    return NodeIdentity(folder, await _join(folder, token, chosen))


async def _join(folder: Path, token: JoinToken, name: str) -> Membership:
    host, port = bounds.host_port(token.address)
    try:
        ca_pem = await asyncio.to_thread(fetch_ca, host, port, token.fingerprint)
    except BootstrapError as error:
        raise NodeError(str(error)) from error
    key = await asyncio.to_thread(_read_key, folder)
    request = pb.JoinRequest(token_secret=token.secret_text, node_name=name, csr_der=_csr(key, name))
    channel = open_join_channel(token.address, ca_pem)
    try:
        stub = cluster_pb2_grpc.EnrollmentStub(channel)
        reply = await stub.Join(request, metadata=metadata(), timeout=JOIN_SECONDS)
        bounds.check_join_reply(reply)
    except grpc.aio.AioRpcError as error:
        if error.code() in _NO_JOIN_PORT:
            raise NodeError(
                f"The coordinator answers at {token.address}, but not as one that lets nodes join: make a token with "
                "its join port (7702, unless it was started with another --join-port), or start it again if it has "
                "just ended."
            ) from error
        raise NodeError(f"The coordinator at {token.address} refuses: {error.details()}") from error
    except bounds.BoundsError as error:
        raise NodeError(f"The coordinator at {token.address} gave no usable answer: {error}") from error
    finally:
        await channel.close()
    joined = _membership(name, reply.cluster_address, _pem(key), reply.certificate_pem, ca_pem)
    await asyncio.to_thread(_save, folder, joined)
    log.info("Joined the cluster as %s; its coordinator is at %s.", name, reply.cluster_address)
    return joined


def _save(folder: Path, joined: Membership) -> None:
    (folder / "certificate.pem").unlink(missing_ok=True)
    write_private(folder / "ca.pem", joined.identity.ca_pem)
    about = {"name": joined.name, "cluster_address": joined.cluster_address}
    write_private(folder / "cluster.json", json.dumps(about).encode())
    write_private(folder / "certificate.pem", joined.identity.chain_pem)


def _load(folder: Path) -> Membership | None:
    if not (folder / "certificate.pem").exists():
        return None
    try:
        about = json.loads((folder / "cluster.json").read_bytes())
        name, address = str(about["name"]), str(about["cluster_address"])
        bounds.host_port(address)
        key_pem, ca_pem = (folder / "key.pem").read_bytes(), (folder / "ca.pem").read_bytes()
        return _membership(name, address, key_pem, (folder / "certificate.pem").read_bytes(), ca_pem)
    except (OSError, KeyError, TypeError, ValueError, NodeError) as error:
        raise NodeError(
            f"The certificate in {folder} cannot be used ({error}): delete that folder and join again with a new "
            "token."
        ) from error


def _membership(name: str, cluster_address: str, key_pem: bytes, chain_pem: bytes, ca_pem: bytes) -> Membership:
    """Checks that the certificate is this cluster's, for this node and this key. Raises NodeError."""
    try:
        bounds.check_certificate(chain_pem)
        leaf = x509.load_pem_x509_certificates(chain_pem)[0]
        ca = x509.load_pem_x509_certificate(ca_pem)
        leaf.verify_directly_issued_by(ca)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        key = serialization.load_pem_private_key(key_pem, password=None)
        fits = key.public_key() == leaf.public_key() and node_dns_name(name) in names.get_values_for_type(
            x509.DNSName
        )
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound) as error:
        raise NodeError(f"This is no certificate of the cluster: {error or type(error).__name__}.") from error
    if not fits:
        raise NodeError(f"The certificate is not for the node {name} and its key.")
    identity = Identity(key_pem, chain_pem, ca_pem)
    fingerprint = ca.fingerprint(hashes.SHA256()).hex()
    return Membership(
        name, cluster_address, identity, leaf.not_valid_before_utc, leaf.not_valid_after_utc, fingerprint
    )


def _read_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    """The node's key, made at first use. Raises NodeError."""
    path = folder / "key.pem"
    if not path.exists():
        write_private(path, _pem(ec.generate_private_key(ec.SECP256R1())))
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise NodeError(f"The key {path} cannot be read: delete {folder} and join again with a new token.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise NodeError(f"The key {path} is of another kind: delete {folder} and join again with a new token.")
    return key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _csr(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """A PKCS#10 request (DER) for this node's name."""
    names = x509.SubjectAlternativeName([x509.DNSName(node_dns_name(name))])
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject).add_extension(names, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
