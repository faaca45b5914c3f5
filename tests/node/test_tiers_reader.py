"""The native threads that read experts' files."""

import os
import threading
from collections import deque

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.expert_node.tiers import reader as reader_module
from moehive.expert_node.tiers.arena import Arena
from moehive.expert_node.tiers.reader import NOW, SPARE, DiskReader, ReadJob, sample_rate


def job_for(path, inbox, nbytes=None):
    nbytes = path.stat().st_size if nbytes is None else nbytes
    return ReadJob(path, Arena(1 << 24).take(nbytes).memory, nbytes, inbox)


def wait_for(reader, inbox, count):
    while True:
        seen = reader.news
        reader.collect()
        if len(inbox) >= count:
            return
        reader.wait(seen)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40_000), min_size=1, max_size=12),
    threads=st.integers(1, 4),
    direct=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_byte_arrives(tmp_path_factory, sizes, threads, direct, seed):
    rng, folder, inbox = np.random.default_rng(seed), tmp_path_factory.mktemp("files"), deque()
    reader = DiskReader(threads, piece_bytes=8192)
    reader.direct = direct
    for number, size in enumerate(sizes):
        path = folder / str(number)
        path.write_bytes(rng.bytes(size))
        reader.read(job_for(path, inbox), int(rng.integers(4)))
    wait_for(reader, inbox, len(sizes))
    assert len(inbox) == len(sizes)
    for job in inbox:
        assert job.error is None
        assert job.buffer[: job.nbytes].numpy().tobytes() == job.path.read_bytes()
    assert reader.totals.nbytes == sum(sizes) and reader.totals.seconds > 0
    reader.close()


def test_what_is_due_first_is_read_first(tmp_path):
    inbox, reader = deque(), DiskReader(threads=1)
    reader.direct = False
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # whoever opens it waits for a writer
    blocking = job_for(pipe, inbox, 1)
    reader.read(blocking, NOW)
    while reader.cancel(blocking):  # until the only thread has begun
        reader.read(blocking, NOW)
    jobs = {}
    for name, due in (("spare", SPARE), ("late", 9), ("gone", 1), ("early", 2), ("hurried", 8), ("now", NOW)):
        path = tmp_path / name
        path.write_bytes(b"x" * 10)
        jobs[name] = job_for(path, inbox)
        reader.read(jobs[name], due)
    reader.move(jobs["hurried"], 1)
    assert reader.cancel(jobs["gone"])
    os.close(os.open(pipe, os.O_WRONLY))
    wait_for(reader, inbox, 6)
    assert [job.path.name for job in inbox] == ["pipe", "now", "hurried", "early", "late", "spare"]
    assert inbox[0].error is not None and all(job.error is None for job in list(inbox)[1:])
    assert not reader.cancel(jobs["late"])
    reader.close()


def test_what_is_begun_and_cancelled_is_read_no_further(tmp_path):
    inbox, reader = deque(), DiskReader(threads=1, piece_bytes=4096)
    reader.direct = False
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    begun = job_for(pipe, inbox, 50_000)
    reader.read(begun, NOW)
    while reader.cancel(begun):
        reader.read(begun, NOW)
    os.close(os.open(pipe, os.O_WRONLY))
    wait_for(reader, inbox, 1)
    assert begun.cancelled and begun.error is None
    assert reader.totals.nbytes == 4096
    reader.close()


def test_what_cannot_be_read_says_why(tmp_path):
    inbox, reader = deque(), DiskReader(threads=2, piece_bytes=4096)
    short = tmp_path / "short"
    short.write_bytes(bytes(5000))
    reader.read(job_for(short, inbox, 50_000), NOW)
    reader.read(job_for(tmp_path / "missing", inbox, 100), NOW)
    wait_for(reader, inbox, 2)
    errors = {job.path.name: job.error for job in inbox}
    assert "fewer than 50000 bytes" in str(errors["short"])
    assert isinstance(errors["missing"], FileNotFoundError)
    reader.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_reader_that_is_closed_leaves_the_rest_unread(tmp_path, threads):
    inbox, reader = deque(), DiskReader(threads)
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    for _ in range(50):
        reader.read(job_for(path, inbox), NOW)
    reader.close()
    assert not inbox


def test_both_ways_of_reading_are_measured(tmp_path):
    files = [tmp_path / str(number) for number in range(4)]
    for path in files:
        path.write_bytes(bytes(30_000))
    assert sample_rate(files, direct=False) > 0
    assert sample_rate(files, direct=True) > 0  # or through the page cache, where the file system has no O_DIRECT


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has only one way")
@pytest.mark.parametrize(("direct", "cached", "kept"), [(1, 2, False), (2, 1, True), (2, 0, None), (0, 1, None)])
def test_the_quicker_way_of_reading_is_kept(tmp_path, monkeypatch, direct, cached, kept):
    """With a way that could not be measured nothing is chosen."""
    files = [tmp_path / str(number) for number in range(5)]
    seen = []

    def rate(paths, way):
        seen.extend(paths)
        return float(direct if way else cached)

    monkeypatch.setattr(reader_module, "sample_rate", rate)
    for before in (False, True):
        reader = DiskReader()
        reader.direct = before
        reader.choose(files)
        assert reader.direct is (before if kept is None else kept) and reader.bandwidth == max(direct, cached)
        reader.close()
    assert sorted(seen) == sorted(2 * files)  # none of them both ways: it would be in the page cache


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="the system has no such policy")
def test_a_node_that_waits_for_its_turn_reads_at_once(tmp_path):
    policies = set()

    def tasks():
        return {thread.id for thread in psutil.Process().threads()}

    def node():
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # as expert_node/courtesy.py does
        before = tasks()
        inbox, path = deque(), tmp_path / "expert"
        path.write_bytes(bytes(64 << 10))
        reader = DiskReader(2)
        reader.read(job_for(path, inbox), NOW)
        wait_for(reader, inbox, 1)
        # Those that have read; one that has not begun yet may still be as it was made.
        policies.update(os.sched_getscheduler(task) for task in tasks() - before)
        reader.close()

    thread = threading.Thread(target=node)
    thread.start()
    thread.join()
    assert os.SCHED_OTHER in policies
