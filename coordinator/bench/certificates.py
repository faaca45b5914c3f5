"""Certificates of a cluster that is made up for a measurement or a test."""

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from moehive.proto.channel import Identity

from ..cluster.trust import Authority


def node_identity(authority: Authority, name: str) -> Identity:
    """What a node of that name has once it has joined."""
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    chain, _ = authority.issue_node(name, csr.public_bytes(serialization.Encoding.DER))
    encryption = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    return Identity(pem, chain, authority.ca_pem)


def write_certificates(folder: Path, nodes: int) -> None:
    """`folder`/coordinator and `folder`/n0, n1, … with key.pem, chain.pem and ca.pem."""
    authority = Authority.create(folder / "authority")
    made = {"coordinator": authority.issue_coordinator()}
    made |= {name: node_identity(authority, name) for name in (f"n{node}" for node in range(nodes))}
    for name, identity in made.items():
        (folder / name).mkdir()
        for file, data in (
            ("key.pem", identity.key_pem),
            ("chain.pem", identity.chain_pem),
            ("ca.pem", identity.ca_pem),
        ):
            (folder / name / file).write_bytes(data)
