"""The cluster's certificate authority and the certificates that it gives.

One CA for each cluster, made by `moehive init`, P-256, 20 years, `<state>/ca/ca.key` and `ca.crt`. Everything that
it signs lives for 30 days and is renewed when a third of that is left. What a certificate is for is said by its DNS
name only: `coordinator.moehive`, `NAME.node.moehive`, or the hosts of the public door. A node chooses neither its
name nor its rights: of its request (PKCS#10) only the public key is taken.
"""

import errno
import ipaddress
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from moehive.proto.bounds import BoundsError, check_csr
from moehive.proto.channel import COORDINATOR_NAME, Identity, node_dns_name

from ..types import CoordinatorError
from ..whole_file import sync_folder

CA_LIFE = timedelta(days=20 * 365)
LIFE = timedelta(days=30)  # of all other certificates
RENEWAL_LEFT = LIFE / 3  # a certificate with less than this left is renewed
BACKDATE = timedelta(days=1)  # certificates start in the past: home machines' clocks differ

KEY_FILE = "ca.key"
CERTIFICATE_FILE = "ca.crt"

_PublicKey: TypeAlias = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


def _now() -> datetime:
    return datetime.now(UTC)


class Authority:
    """Signs the cluster's certificates. Any thread may use it."""

    def __init__(
        self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, clock: Callable[[], datetime] = _now
    ) -> None:
        """See `create` and `load`; `clock` is the time in UTC."""
        self._key = key
        self._certificate = certificate
        self._clock = clock
        self.ca_pem = certificate.public_bytes(serialization.Encoding.PEM)
        self.fingerprint = certificate.fingerprint(hashes.SHA256()).hex()  # of its DER; 64 hexadecimal digits

    @classmethod
    def create(cls, folder: Path, clock: Callable[[], datetime] = _now) -> "Authority":
        """Makes a new cluster's CA in `folder`. Raises CoordinatorError when there is one or it can't be written."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Moehive cluster {secrets.token_hex(4)}")])
        start = clock()
        certificate = (
            _builder(name, name, key.public_key(), start - BACKDATE, start + CA_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        files = {KEY_FILE: _key_pem(key), CERTIFICATE_FILE: certificate.public_bytes(serialization.Encoding.PEM)}
        try:
            _write_folder(folder, files)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and folder.is_dir():
                raise CoordinatorError(
                    f"{folder} holds a cluster's certificate authority already; every node trusts it, so it is not "
                    "replaced. Choose another state directory for another cluster."
                ) from error
            raise CoordinatorError(
                f"The certificate authority can't be written to {folder} ({error.strerror}); free space on that disk "
                "or check who owns the directory."
            ) from error
        return cls(key, certificate, clock)

    @classmethod
    def load(cls, folder: Path, clock: Callable[[], datetime] = _now) -> "Authority":
        """The CA in `folder`. Raises CoordinatorError when it is missing, unreadable or damaged."""
        try:
            key_pem, certificate_pem = (folder / KEY_FILE).read_bytes(), (folder / CERTIFICATE_FILE).read_bytes()
        except FileNotFoundError as error:
            raise CoordinatorError(
                f"There is no cluster in {folder.parent}: its certificate authority is missing. Run `moehive init`."
            ) from error
        except OSError as error:
            raise CoordinatorError(
                f"The certificate authority in {folder} can't be read ({error.strerror}); check who owns its files."
            ) from error
        try:
            key = serialization.load_pem_private_key(key_pem, password=None)
            certificate = x509.load_pem_x509_certificate(certificate_pem)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise CoordinatorError(
                f"The certificate authority in {folder} is damaged; restore its files from a copy."
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise CoordinatorError(f"The key and the certificate in {folder} do not belong together; restore both.")
        return cls(key, certificate, clock)

    def issue_coordinator(self) -> Identity:
        """A new key and certificate for the coordinator's internal services and channels."""
        return self._issue([x509.DNSName(COORDINATOR_NAME)], COORDINATOR_NAME)

    def issue_server(self, hosts: Sequence[str]) -> Identity:
        """A new key and certificate for the public door, good for `hosts` (DNS names and IP addresses)."""
        if not hosts:
            raise CoordinatorError("A server's certificate needs at least one host name or address.")
        return self._issue([_general_name(host) for host in hosts], "Moehive server")

    def issue_node(self, name: str, csr_der: bytes) -> tuple[bytes, datetime]:
        """A certificate for the node `name` with the request's key, then the CA's (PEM), and when it expires.

        Raises BoundsError when the request is not one that can be granted.
        """
        public_key = _requested_key(csr_der)
        certificate = self._sign(public_key, [x509.DNSName(node_dns_name(name))], name)
        chain = certificate.public_bytes(serialization.Encoding.PEM) + self.ca_pem
        return chain, certificate.not_valid_after_utc

    def expired(self, certificate_der: bytes) -> bool:
        """Whether a certificate's time is over: a connection may outlive the certificate that it was opened with."""
        return x509.load_der_x509_certificate(certificate_der).not_valid_after_utc <= self._clock()

    def renewing(self, issue: Callable[[], Identity]) -> Callable[[], Identity]:
        """A function that returns what `issue` made, and makes it again when a third of its life is left."""
        lock = threading.Lock()
        identity = issue()
        due = self._clock() + LIFE - RENEWAL_LEFT

        def current() -> Identity:
            nonlocal identity, due
            with lock:
                if self._clock() >= due:
                    identity = issue()
                    due = self._clock() + LIFE - RENEWAL_LEFT
                return identity

        return current

    def _issue(self, names: list[x509.GeneralName], common_name: str) -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(key.public_key(), names, common_name)
        chain = certificate.public_bytes(serialization.Encoding.PEM) + self.ca_pem
        return Identity(_key_pem(key), chain, self.ca_pem)

    def _sign(
        self,
        public_key: _PublicKey,
        names: list[x509.GeneralName],
        common_name: str,
    ) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        start = self._clock()
        both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        ca_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            _builder(subject, self._certificate.subject, public_key, start - BACKDATE, start + LIFE)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(both), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(ca_key, critical=False)
            .sign(self._key, hashes.SHA256())
        )


def _requested_key(csr_der: bytes) -> _PublicKey:
    """The public key of a certificate request whose own signature is right."""
    check_csr(csr_der)
    try:
        csr = x509.load_der_x509_csr(csr_der)
        key = csr.public_key()
        signed = csr.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BoundsError("The certificate request is not a valid PKCS#10 request.") from error
    if not signed:
        raise BoundsError("The certificate request is not signed with the key that it names.")
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    if isinstance(key, rsa.RSAPublicKey) and 2048 <= key.key_size <= 4096:
        return key
    # Ed25519 is left out on purpose: gRPC's TLS does not accept such certificates.
    raise BoundsError("The certificate request's key must be P-256, or RSA of 2,048 to 4,096 bits.")


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: _PublicKey,
    start: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("idna").decode("ascii"))
    except (ValueError, UnicodeError) as error:
        raise CoordinatorError(f"{host!r} is neither a host name nor an IP address.") from error


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes private files into a folder beside, and renames it once the disk has them: all appear or none.

    Renaming fails when `folder` is there and not empty.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))  # mode 0700
    try:
        for name, data in files.items():
            descriptor = os.open(beside / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
        sync_folder(beside)
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync_folder(folder.parent)
