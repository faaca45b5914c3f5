"""A manifest survives its bytes; hostile bytes end in a GeometryError and in nothing else."""

from typing import get_args

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.kernels import manifest as codec
from moehive.kernels.geometry import Activation, ExpertSpec, Format, GeometryError, LayerGeometry, Manifest

finite = st.floats(-100, 100)


@st.composite
def specs(draw: st.DrawFn) -> ExpertSpec:
    activation = draw(st.sampled_from(get_args(Activation)))
    return ExpertSpec(
        hidden_size=draw(st.integers(1, 65536)),
        intermediate_size=draw(st.integers(1, 65536)),
        activation=activation,
        gated=draw(st.booleans()),
        alpha=draw(finite) if activation == "silu" else 1.0,
        limit=draw(st.none() | st.floats(1e-3, 100)),
        limit_after_activation=draw(st.booleans()),
        up_offset=draw(finite),
        bias=draw(st.booleans()),
        post_norm_eps=draw(st.none() | st.floats(0, 1)),
        format=draw(st.sampled_from(get_args(Format))),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    kinds = []
    for spec in draw(st.lists(specs(), min_size=1, max_size=3)):
        experts = draw(st.integers(1, 512))
        pair = st.tuples(st.sampled_from(get_args(Format)), st.sampled_from(get_args(Format)))
        formats = (
            draw(st.lists(pair, min_size=experts, max_size=experts)) if experts < 20 and draw(st.booleans()) else ()
        )
        kinds.append(LayerGeometry(experts, draw(st.integers(1, min(experts, 64))), spec, tuple(formats)))
    layers = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=40))
    fingerprint = draw(st.text("0123456789abcdef", min_size=64, max_size=64))
    return Manifest(draw(st.text(min_size=1, max_size=20)), fingerprint, tuple(layers))


def readable(data: bytes) -> Manifest | None:
    """The manifest, or None for bytes that are refused as they should be: by one sentence."""
    try:
        return codec.from_bytes(data)
    except GeometryError as error:
        assert str(error).endswith(".") and "\n" not in str(error)
        return None


@given(manifests())
def test_a_manifest_survives_its_bytes(manifest: Manifest) -> None:
    assert codec.from_bytes(codec.to_bytes(manifest)) == manifest


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    assert readable(data) is None


@given(manifests(), st.data())
def test_a_damaged_manifest_is_refused_or_sound(manifest: Manifest, data: st.DataObject) -> None:
    packed = bytearray(codec.to_bytes(manifest))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    found = readable(bytes(packed[: data.draw(st.integers(0, len(packed)))]))
    if found is not None:
        assert found.total_bytes > 0


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
SPEC_FIELDS = (
    "hidden_size", "intermediate_size", "activation", "gated", "alpha", "limit", "limit_after_activation",
    "up_offset", "bias", "post_norm_eps", "format",
)  # fmt: skip


@given(
    st.sampled_from(
        [
            ("version",), ("name",), ("fingerprint",), ("kinds",), ("layers",), ("kinds", 0), ("layers", 0),
            ("kinds", 0, "experts"), ("kinds", 0, "top_k"), ("kinds", 0, "spec"),
            *(("kinds", 0, "spec", field) for field in SPEC_FIELDS),
        ]
    ),
    junk,
)  # fmt: skip
def test_one_field_of_junk_is_refused_or_sound(path: tuple[str | int, ...], value: object) -> None:
    spec = ExpertSpec(hidden_size=8, intermediate_size=4, activation="silu")
    packed = msgpack.unpackb(codec.to_bytes(Manifest("m", "0" * 64, (LayerGeometry(4, 2, spec),))))
    inner = packed
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    found = readable(msgpack.packb(packed))
    if found is not None:
        assert found.total_bytes > 0
        assert codec.from_bytes(codec.to_bytes(found)) == found


def test_too_many_bytes_are_refused_before_they_are_read() -> None:
    with pytest.raises(GeometryError, match="at most 4194304 are allowed"):
        codec.from_bytes(bytes(codec.MAX_BYTES + 1))


def test_another_version_is_named() -> None:
    with pytest.raises(GeometryError, match=r"version 7; this build reads 3\. Update the older side"):
        codec.from_bytes(msgpack.packb({"version": 7}))
