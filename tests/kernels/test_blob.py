"""Formats, the blob's layout, and what a wrong blob is told."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moehive.kernels.blob import build_blob, empty_blob, tensor_views
from moehive.kernels.formats.registry import FORMATS
from moehive.kernels.geometry import ALIGNMENT, BLOCKS, PLAIN_BYTES, ExpertSpec, Format, GeometryError
from moehive.kernels.ops import load_expert

SPEC = ExpertSpec(
    hidden_size=65, intermediate_size=33, activation="silu", bias=True, post_norm_eps=1e-5, format="bf16"
)


def tensors_of(spec: ExpertSpec) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {place.name: torch.randn(place.shape, generator=generator) for place in spec.tensors}


def test_every_format_of_the_geometry_has_its_code() -> None:
    assert set(FORMATS) == set(PLAIN_BYTES) | set(BLOCKS) == set(get_args(Format))
    for name, fmt in FORMATS.items():
        assert fmt.name == name
        if name in PLAIN_BYTES:
            stored = fmt.view(empty_blob(6 * PLAIN_BYTES[name]), (2, 3))
            assert stored.shape == (2, 3) and stored.nbytes == 6 * PLAIN_BYTES[name]


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_each_16_bit_code_decodes_and_encodes_to_itself(name: str) -> None:
    codes = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    numbers = FORMATS[name].decode(FORMATS[name].view(codes, (256, 256)), (256, 256))
    again = empty_blob(2 * 65536)
    FORMATS[name].encode(numbers, again)
    finite = ~numbers.isnan().flatten()
    assert torch.equal(again.view(torch.uint16)[finite], codes.view(torch.uint16)[finite])
    assert FORMATS[name].decode(FORMATS[name].view(again, (65536,)), (65536,))[~finite].isnan().all()
    assert int((~finite).sum()) == {"bf16": 254, "f16": 2046}[name]


@pytest.mark.parametrize(("name", "step"), [("f32", 0.0), ("bf16", 2**-8), ("f16", 2**-11)])
@given(number=st.floats(2**-14, 65504, width=32))
def test_encoding_rounds_to_nearest(name: str, step: float, number: float) -> None:
    raw = empty_blob(PLAIN_BYTES[name])
    FORMATS[name].encode(
        torch.tensor([number]),
        raw,
    )
    assert abs(FORMATS[name].decode(FORMATS[name].view(raw, (1,)), (1,)).item() - number) <= step * number


@pytest.mark.parametrize("fmt", PLAIN_BYTES)
def test_a_blob_holds_its_tensors_where_the_spec_says(fmt: Format) -> None:
    spec = ExpertSpec(
        hidden_size=65, intermediate_size=33, activation="silu", bias=True, post_norm_eps=1e-5, format=fmt
    )
    tensors = tensors_of(spec)
    blob = build_blob(spec, tensors)
    assert blob.data_ptr() % ALIGNMENT == 0
    covered = torch.zeros(len(blob), dtype=torch.bool)
    for place, view in zip(spec.tensors, tensor_views(spec, blob).values(), strict=True):
        assert view.data_ptr() == blob.data_ptr() + place.offset
        assert place.offset % ALIGNMENT == 0
        assert torch.equal(view, tensors[place.name].to(view.dtype))
        covered[place.offset : place.offset + place.nbytes] = True
    assert not blob[~covered].any(), "padding must be zeros, so that equal experts have equal hashes"
    assert len(blob) == spec.nbytes and not covered.all()


def test_loading_copies_nothing() -> None:
    blob = build_blob(SPEC, tensors_of(SPEC))
    expert = load_expert(SPEC, blob)
    assert expert.address == blob.data_ptr()
    assert expert.tensors["up"].data_ptr() == blob.data_ptr()


@pytest.mark.parametrize(
    ("blob", "sentence"),
    [
        (empty_blob(SPEC.nbytes - 1), f"must have {SPEC.nbytes} bytes, not {SPEC.nbytes - 1}."),
        (empty_blob(SPEC.nbytes + 64), f"must have {SPEC.nbytes} bytes, not {SPEC.nbytes + 64}."),
        (empty_blob(0), f"must have {SPEC.nbytes} bytes, not 0."),
        (empty_blob(SPEC.nbytes + 1)[1:], "must start at a multiple of 64 bytes"),
        (torch.empty(SPEC.nbytes, dtype=torch.int8), "must be one contiguous row of bytes"),
        (empty_blob(2 * SPEC.nbytes)[::2], "must be one contiguous row of bytes"),
        (empty_blob(SPEC.nbytes).view(1, -1), "must be one contiguous row of bytes"),
    ],
)
def test_a_wrong_blob_is_refused_in_a_sentence(blob: torch.Tensor, sentence: str) -> None:
    with pytest.raises(GeometryError) as caught:
        load_expert(SPEC, blob)
    assert sentence in str(caught.value)


def test_wrong_tensors_are_refused_in_a_sentence() -> None:
    tensors = tensors_of(SPEC)
    with pytest.raises(GeometryError, match=r"needs the tensors .*up_bias, not .*post_norm, up\.$"):
        build_blob(SPEC, {name: tensor for name, tensor in tensors.items() if "bias" not in name})
    with pytest.raises(GeometryError, match="needs the tensors"):
        build_blob(SPEC, {**tensors, "gate": tensors["up"]})
    with pytest.raises(GeometryError, match=r"tensor up must hold floats of shape \[66, 65\], not float32 of shape"):
        build_blob(SPEC, {**tensors, "up": tensors["up"].T})
    with pytest.raises(GeometryError, match="not int64 of shape"):
        build_blob(SPEC, {**tensors, "up": tensors["up"].long()})
