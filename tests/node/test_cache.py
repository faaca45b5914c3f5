"""The disk cache: what is on disk is whole, or is fetched again; a full disk is a sentence."""

import asyncio
import os
import resource
from pathlib import Path

import pytest

from moehive.coordinator.types import NodeName
from moehive.expert_node import cache as cache_module
from moehive.expert_node.cache import CacheError, DiskCache
from moehive.kernels.digest import digest_of
from moehive.kernels.geometry import ExpertId

A = NodeName("a")
E = ExpertId(3, 17)
DATA = bytes(range(256)) * 40
MIB = 1 << 20


def read(cache: DiskCache, nbytes: int = len(DATA)) -> bytes | None:
    blob = cache.load(E, nbytes)
    return None if blob is None else blob.numpy().tobytes()


def write(cache: DiskCache, data: bytes = DATA) -> None:
    part = cache.part(E, len(data))
    part.append(data)
    part.keep()


def test_written_then_read_by_another_process(tmp_path):
    assert read(DiskCache(tmp_path, "f" * 64)) is None
    write(DiskCache(tmp_path, "f" * 64))
    (file,) = (tmp_path / ("f" * 64)).iterdir()
    assert file.name == f"3-17.{digest_of(DATA).hex()}.expert"
    assert E in DiskCache(tmp_path, "f" * 64) and read(DiskCache(tmp_path, "f" * 64)) == DATA
    assert E not in DiskCache(tmp_path, "e" * 64)


@pytest.mark.parametrize("harm", [lambda d: d[:-1], lambda d: d + b"x", lambda d: b"y" + d[1:], lambda d: b""])
def test_a_damaged_file_is_deleted(tmp_path, harm):
    write(DiskCache(tmp_path, "f" * 64))
    (file,) = (tmp_path / ("f" * 64)).iterdir()
    file.write_bytes(harm(DATA))
    assert read(DiskCache(tmp_path, "f" * 64)) is None
    assert not file.exists()


def test_a_part_is_resumed_where_it_ended(tmp_path):
    cache = DiskCache(tmp_path, "f" * 64)
    part = cache.part(E, len(DATA))
    part.append(DATA[:1000])
    part.close()
    cache = DiskCache(tmp_path, "f" * 64)
    assert E not in cache and cache.part_bytes(E, len(DATA)) == 1000
    part = cache.part(E, len(DATA))
    assert part.offset == 1000
    part.append(DATA[1000:])
    assert part.digest == digest_of(DATA)
    assert part.keep().numpy().tobytes() == DATA
    assert read(DiskCache(tmp_path, "f" * 64)) == DATA


def test_an_expert_is_mapped_and_no_file_stays_open(tmp_path):
    nbytes = 8 * MIB
    write(DiskCache(tmp_path, "f" * 64), os.urandom(nbytes))
    opened = sum(1 for _ in Path("/proc/self/fd").iterdir())
    blob = DiskCache(tmp_path, "f" * 64).load(E, nbytes)
    assert blob is not None and blob.data_ptr() % 64 == 0
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == opened  # a slice has thousands of experts
    (file,) = (tmp_path / ("f" * 64)).iterdir()
    begin = f"{blob.data_ptr():x}-"
    entry = next(line for line in Path("/proc/self/maps").read_text().splitlines() if line.startswith(begin))
    assert entry.endswith(str(file))
    data = file.read_bytes()
    file.unlink()  # what is mapped stays
    assert blob.numpy().tobytes() == data


def test_a_part_takes_no_more_than_the_expert_has(tmp_path):
    part = DiskCache(tmp_path, "f" * 64).part(E, len(DATA))
    part.append(DATA[:-1])
    with pytest.raises(ValueError, match="more bytes"):
        part.append(b"xy")
    part.close()


def test_a_part_that_is_too_long_starts_anew(tmp_path):
    cache = DiskCache(tmp_path, "f" * 64)
    (tmp_path / ("f" * 64) / "3-17.part").write_bytes(DATA)
    assert cache.part_bytes(E, len(DATA)) == 0
    assert cache.part(E, len(DATA)).offset == 0


def lay_folder(path: Path) -> None:
    (path / "inner").mkdir(parents=True)


def lay_link(path: Path) -> None:
    path.symlink_to(path.parent)


@pytest.mark.parametrize("lay", [lay_folder, lay_link, os.mkfifo], ids=["folder", "link", "pipe"])
@pytest.mark.parametrize("nbytes", [100, len(DATA)])  # less and more than a folder's own size
def test_what_is_no_file_makes_way_for_a_part(tmp_path, lay, nbytes):
    cache = DiskCache(tmp_path, "f" * 64)
    lay(tmp_path / ("f" * 64) / "3-17.part")
    assert cache.part_bytes(E, nbytes) == 0
    write(cache, DATA[:nbytes])
    assert read(cache, nbytes) == DATA[:nbytes]


def test_other_models_make_room_the_oldest_first(small_disk):
    for age, name in ((300, "a" * 64), (100, "b" * 64), (200, "c" * 64)):
        DiskCache(small_disk, name)
        (small_disk / name / f"0-0.{'0' * 64}.expert").write_bytes(bytes(MIB))
        os.utime(small_disk / name, (1e9 - age, 1e9 - age))
    cache = DiskCache(small_disk, "d" * 64)

    def names():
        return sorted(path.name[0] for path in small_disk.iterdir())

    cache.make_room(0)
    assert names() == ["a", "b", "c", "d"]
    cache.make_room(int(2.5 * MIB))  # 17 of 20 MiB are free, 16 stay so
    assert names() == ["b", "d"]
    with pytest.raises(CacheError, match="free some space"):
        cache.make_room(5 * MIB)
    assert names() == ["d"]


def test_disk_full_gives_the_part_back(small_disk, fill):
    cache = DiskCache(small_disk, "d" * 64)
    fill(small_disk, 64 << 10)
    part = cache.part(E, MIB)
    with pytest.raises(CacheError, match=r"disk of .* is full: free some space"):
        for _ in range(16):
            part.append(bytes(MIB // 16))
    assert list((small_disk / ("d" * 64)).iterdir()) == []


def test_a_limit_on_file_sizes_gives_the_part_back(tmp_path):
    cache = DiskCache(tmp_path, "d" * 64)
    part = cache.part(E, MIB)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, limits[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(CacheError, match=r"File too large.*--state-dir"):
            for _ in range(16):
                part.append(bytes(MIB // 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / ("d" * 64)).iterdir()) == []


def test_no_permission_is_a_sentence(tmp_path, as_nobody):
    for path in (tmp_path, *tmp_path.parents):  # so that it is this folder that refuses
        if path.name.startswith("pytest") or path == tmp_path:
            path.chmod(0o755)
    folder = tmp_path / "mine"
    write(DiskCache(folder, "d" * 64))
    folder.chmod(0o555)
    (folder / ("d" * 64)).chmod(0o555)
    with as_nobody():
        with pytest.raises(CacheError, match=r"Permission denied.*check who owns it.*--state-dir"):
            DiskCache(folder, "e" * 64)
    (folder / ("d" * 64)).chmod(0o755)
    folder.chmod(0o755)


def test_an_unreadable_file_is_fetched_again(tmp_path):
    cache = DiskCache(tmp_path, "d" * 64)
    write(cache)
    (file,) = (tmp_path / ("d" * 64)).iterdir()
    file.unlink()
    lay_folder(file)  # a read of it fails
    assert E in cache and cache.checked(E) is not None
    assert cache.load(E, len(DATA)) is None and E not in cache
    write(cache)
    assert read(cache) == DATA


@pytest.mark.parametrize("spare", [cache_module._SPARE_BYTES, -MIB], ids=["before", "in mid-fetch"])
def test_disk_full_during_a_fetch(
    small_disk, fill, tmp_path, coordinator_class, authority, model, node_here, make_request, monkeypatch, spare
):
    """The node says so, lives on, and has its slice once there is room."""
    monkeypatch.setattr(cache_module, "_SPARE_BYTES", spare)

    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        state = small_disk / "state"
        state.mkdir()
        ballast = fill(small_disk, 150 << 10)  # 12 experts need some 220 KiB
        async with node_here(state, coordinator.token()):
            await coordinator.until(lambda s: A in s.nodes and s.nodes[A].problem != "")
            problem = coordinator.membership.state.nodes[A].problem
            assert "disk" in problem and "--state-dir" in problem and "free some space" in problem
            whole = list(state.glob("cache/*/*.expert"))
            assert all(digest_of(p.read_bytes()).hex() == p.name.split(".")[1] for p in whole)
            assert coordinator.membership.state.nodes[A].present
            ballast.unlink()
            await coordinator.until_ready()
            epoch = coordinator.membership.state.epoch
            assert (await coordinator.compute(make_request(64, [0, 5], epoch=epoch)[0])).rows == 1
        await coordinator.stop()

    asyncio.run(main())
