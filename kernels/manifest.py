"""A manifest as bytes: msgpack, read from the network and from disk, so nothing in it is believed."""

from dataclasses import asdict, fields
from typing import Any, cast, get_args

import msgpack

from .geometry import ExpertSpec, Format, GeometryError, LayerGeometry, Manifest

VERSION = 3
_FORMATS = get_args(Format)
MAX_BYTES = 4 << 20


def to_bytes(manifest: Manifest) -> bytes:
    """Packs a manifest; equal layers are stored once, so a model of a thousand layers stays small."""
    kinds = list(dict.fromkeys(manifest.layers))
    packed = {
        "version": VERSION,
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        "kinds": [
            {
                "experts": kind.experts,
                "top_k": kind.top_k,
                "spec": asdict(kind.spec),
                "formats": bytes(_FORMATS.index(fmt) for formats in kind.formats for fmt in formats),
            }
            for kind in kinds
        ],
        "layers": [kinds.index(layer) for layer in manifest.layers],
    }
    return cast(bytes, msgpack.packb(packed))


def from_bytes(data: bytes) -> Manifest:
    """Unpacks and checks a manifest.

    Raises GeometryError, one sentence, for anything that `to_bytes` would not have written.
    """
    if len(data) > MAX_BYTES:
        raise GeometryError(f"The manifest has {len(data)} bytes; at most {MAX_BYTES} are allowed.")
    try:
        packed: Any = msgpack.unpackb(data, max_map_len=64, max_array_len=4096, max_str_len=4096)
    except Exception as error:  # msgpack raises many kinds for hostile bytes
        raise GeometryError("The manifest is not valid msgpack.") from error
    try:
        if packed["version"] != VERSION:
            raise GeometryError(
                f"The manifest has version {repr(packed['version'])[:40]}; this build reads {VERSION}. Update the "
                "older side."
            )
        kinds = [_layer(kind) for kind in packed["kinds"]]
        order: list[Any] = packed["layers"]
        if not all(type(k) is int and 0 <= k < len(kinds) for k in order):
            raise GeometryError("The manifest names a kind of layer that it does not describe.")
        name, fingerprint = packed["name"], packed["fingerprint"]
        if not (isinstance(name, str) and isinstance(fingerprint, str)):
            raise GeometryError("The manifest's name and fingerprint must be text.")
        return Manifest(name, fingerprint, tuple(kinds[k] for k in order))
    except (KeyError, TypeError, AttributeError) as error:
        raise GeometryError("The manifest lacks a field or has one of the wrong type.") from error


def _layer(packed: dict[str, Any]) -> LayerGeometry:
    spec: dict[str, Any] = packed["spec"]
    if set(spec) != {field.name for field in fields(ExpertSpec)}:
        raise GeometryError("The manifest describes an expert by fields that this build does not know.")
    kinds: dict[str, tuple[type, ...]] = {
        "int": (int,), "float": (int, float), "bool": (bool,), "str": (str,),
    }  # fmt: skip
    wanted = {
        "hidden_size": "int", "intermediate_size": "int", "activation": "str", "gated": "bool",
        "alpha": "float", "limit": "float", "limit_after_activation": "bool", "up_offset": "float",
        "bias": "bool", "post_norm_eps": "float", "format": "str", "down_format": "str",
    }  # fmt: skip
    for name, kind in wanted.items():
        value = spec[name]
        optional = value is None and name in ("limit", "post_norm_eps", "down_format")
        if not optional and (type(value) not in kinds[kind]):
            raise GeometryError(f"The manifest's {name} must be of type {kind}, not {repr(value)[:40]}.")
    if type(packed["experts"]) is not int or type(packed["top_k"]) is not int:
        raise GeometryError("The manifest's experts and top_k must be integers.")
    return LayerGeometry(packed["experts"], packed["top_k"], ExpertSpec(**spec), _formats(packed["formats"]))


def _formats(packed: Any) -> tuple[tuple[Format, Format], ...]:
    if type(packed) is not bytes or len(packed) % 2 or any(number >= len(_FORMATS) for number in packed):
        raise GeometryError("The manifest names formats that this build does not know.")
    named = [_FORMATS[number] for number in packed]
    return tuple(zip(named[0::2], named[1::2], strict=True))
