"""Two builds that cannot talk say so in a sentence that names both versions."""

from hypothesis import given
from hypothesis import strategies as st

from moehive.proto import handshake
from moehive.proto.handshake import PROTOCOL, PROTOCOL_KEY, VERSION_KEY, metadata, mismatch, software_version


def test_the_same_build_can_talk() -> None:
    assert mismatch(metadata()) is None
    assert mismatch([("user-agent", "grpc"), *metadata()]) is None


def test_a_patch_release_with_the_same_protocol_can_talk() -> None:
    assert mismatch([(PROTOCOL_KEY, str(PROTOCOL)), (VERSION_KEY, "99.0")]) is None


def test_another_protocol_names_both_versions() -> None:
    sentence = mismatch([(PROTOCOL_KEY, "7"), (VERSION_KEY, "3.2.1")])
    assert sentence is not None
    assert "3.2.1 (protocol 7)" in sentence
    assert f"{software_version()} (protocol {PROTOCOL})" in sentence
    assert sentence.endswith("install the same version on both.")


def test_a_caller_without_metadata() -> None:
    sentence = mismatch([])
    assert sentence is not None and "an unknown version (protocol none)" in sentence


def test_an_installation_without_metadata_has_a_version_all_the_same() -> None:
    assert handshake.software_version() not in ("", "unknown")


@given(
    st.lists(
        st.tuples(
            st.sampled_from([PROTOCOL_KEY, VERSION_KEY, "other"]), st.text(max_size=500) | st.binary(max_size=500)
        )
    )
)
def test_hostile_metadata_gives_a_short_sentence(received: list[tuple[str, str | bytes]]) -> None:
    sentence = mismatch(received)
    assert sentence is None or len(sentence) < 300
