"""Bytes and counts in words: read back, they are the number to as many digits as are shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.coordinator.sizes import in_bytes, in_count, in_digits

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "million": 10**6, "billion": 10**9}


@given(st.integers(0, 10**15))
def test_what_is_said_is_the_number(count: int) -> None:
    for said in (in_bytes(count), in_count(count)):
        number, _, unit = said.partition(" ")
        assert float(number.replace(",", "")) * UNITS.get(unit, 1) == pytest.approx(count, rel=0.051)
        assert unit in ("GB", "billion", "") or float(number.replace(",", "")) < 1000


@given(st.floats(1e-6, 1e12))
def test_a_measured_number_has_three_digits_and_no_exponent(value: float) -> None:
    said = in_digits(value)
    assert float(said.replace(",", "")) == pytest.approx(value, rel=0.0051)
    assert "e" not in said or value < 1e-4


def test_as_a_person_reads_them() -> None:
    assert [in_bytes(n) for n in (0, 999, 70464, 999_960, 130.5e9)] == [
        "0 B",
        "999 B",
        "70.5 kB",
        "1.0 MB",
        "130.5 GB",
    ]
    assert [in_count(n) for n in (63904, 1_234_567, 396e9)] == ["63,904", "1.2 million", "396 billion"]
    assert [in_digits(n) for n in (0.05123, 6.456, 999.7, 63600.0)] == ["0.0512", "6.46", "1,000", "63,600"]
