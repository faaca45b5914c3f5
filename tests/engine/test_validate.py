"""Every bound of a request has a sentence that names its parameter."""

import math
from typing import Any

import pytest

from moehive.coordinator.engine import validate
from moehive.coordinator.types import GenerationRequest, InvalidRequest, SamplingParams


def request(**changes: Any) -> GenerationRequest:
    return GenerationRequest(**{"request_id": "r", "prompt": (1, 2), **changes})


@pytest.mark.parametrize(
    ("parameter", "values"),
    [
        ("temperature", [-0.1, 100.5, math.nan, math.inf]),
        ("top_k", [-1]),
        ("top_p", [0, -1, 1.01, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("repetition_penalty", [0, -1, 101, math.inf]),
        ("presence_penalty", [-2.1, 2.1, math.nan]),
        ("frequency_penalty", [-2.1, 2.1, -math.inf]),
        ("seed", [-1, 1 << 64]),
    ],
)
def test_sampling(parameter: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest, match=f"^{parameter} is .* must be .*") as caught:
            validate.check_request(request(sampling=SamplingParams(**{parameter: value})), 10, 100)
        assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    ("changes", "parameter", "sentence"),
    [
        ({"request_id": ""}, "request_id", "0 characters"),
        ({"request_id": "x" * 129}, "request_id", "129 characters"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be at least 1"),
        ({"max_tokens": -5}, "max_tokens", "max_tokens is -5"),
        ({"logprobs": 21}, "logprobs", "logprobs is 21"),
        ({"prompt": ()}, "prompt", "empty"),
        ({"prompt": (1,) * 100}, "prompt", "100 tokens .* holds 100"),
        ({"prompt": (1, 10)}, "prompt", "Token id 10 .* 0 to 9"),
        ({"prompt": (-1,)}, "prompt", "Token id -1"),
    ],
)
def test_request(changes: dict[str, Any], parameter: str, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        validate.check_request(request(**changes), 10, 100)
    assert caught.value.parameter == parameter


def test_stops() -> None:
    for stops in (["x"] * 17, [""], ["x" * 1025]):
        with pytest.raises(InvalidRequest) as caught:
            validate.check_stops(stops)
        assert caught.value.parameter == "stop"


def test_what_is_in_bounds_passes() -> None:
    validate.check_stops(["x" * 1024] * 16)
    edges = SamplingParams(
        temperature=100, top_k=0, top_p=1, min_p=1, repetition_penalty=100, presence_penalty=-2, seed=(1 << 64) - 1
    )
    longest = request(prompt=(9,) * 99, request_id="x" * 128, max_tokens=1 << 40, logprobs=20, sampling=edges)
    validate.check_request(longest, 10, 100)
