"""Settings: where they come from, which one wins, and what is said of wrong ones."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.coordinator.settings import CoordinatorSettings, SettingsError, load_settings, parse_size


def test_file_then_environment_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "moehive.toml"
    file.write_text('model = "from-file"\ngrpc_port = 1\nhttp_port = 2\nmin_nodes = 3\nkv_bytes = "2GiB"\n')
    environment = {"MOEHIVE_COORDINATOR_HTTP_PORT": "20", "MOEHIVE_COORDINATOR_MIN_NODES": "30", "PATH": "/bin"}
    settings = load_settings({"min_nodes": 300, "threads": None}, file, environment)
    assert settings.model == "from-file"
    assert (settings.grpc_port, settings.http_port, settings.min_nodes) == (1, 20, 300)
    assert settings.kv_bytes == 2 << 30


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("prot = 1", "unknown setting 'prot'; the settings are .*grpc_port"),
        ('grpc_port = "many"', "grpc_port must be a whole number, not 'many'"),
        ("grpc_port = true", "grpc_port must be a whole number, not True"),
        ("deterministic = 3", "deterministic must be true or false, not 3"),
        ("host = 3", "host must be text, not 3"),
        ("min_nodes = 0", "min_nodes must be 1 to 1024"),
        ("kv_bytes = 1", "kv_bytes must be at least 1MiB"),
        ("= 3", "is not valid TOML"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, wanted: str) -> None:
    file = tmp_path / "moehive.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=wanted):
        load_settings({"model": "m"}, file, {})


def test_nodes_are_told_a_name_that_reaches_this_machine() -> None:
    assert CoordinatorSettings(model="m").cluster_advertise == "127.0.0.1"
    assert CoordinatorSettings(model="m", cluster_host="10.0.0.7").cluster_advertise == "10.0.0.7"
    assert CoordinatorSettings(model="m", cluster_host="0.0.0.0").cluster_advertise not in ("", "0.0.0.0")


@pytest.mark.parametrize("name", ["10.0.0.7", "fe80::1", "den.local"])
def test_a_name_for_nodes_is_a_host(name: str) -> None:
    assert CoordinatorSettings(model="m", cluster_advertise=name).cluster_advertise == name
    for wrong in (f"{name} ", f"[{name}]", f"http://{name}", f"{name}:7702" if ":" not in name else f"[{name}]:7702"):
        with pytest.raises(SettingsError, match="cluster_advertise must be this machine's name or address, no port"):
            CoordinatorSettings(model="m", cluster_advertise=wrong)


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("12GiB", 12 << 30), ("800 mb", 800_000_000), ("1.5T", 1_500_000_000_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["1000001T", "9" * 20 + "T", "9" * 400, "9" * 5000, "0." + "9" * 400])
def test_a_size_beyond_all_machines_is_a_sentence(text: str) -> None:
    with pytest.raises(SettingsError, match="is not a size"):
        parse_size(text)


@given(st.text(max_size=20))
def test_a_size_is_a_number_or_a_sentence(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except SettingsError as error:
        assert "is not a size" in str(error)
