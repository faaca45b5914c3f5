"""What an expert node runs before it starts, so that `moehive bench chaos` may have it lie or ail.

The node reads the file `fault` in its state directory at its start and then twenty times a second; it holds one of

    nan, garbage, old, memory    a lie: answers are not numbers, are cut short, name an earlier request, or there is
                                 no memory to compute them
    disk full                    what is written to the cache of experts fails
    clock                        the node's clock is a year ahead

or is missing: all is well. At the first effect of the latter two it makes the file `felt` beside it.

The clock is the one that the node's own code reads. TLS reads the system's, and would refuse the
connections too; either way the node takes its certificate for expired and stays away. Python's `time.time` is left
alone: gRPC makes deadlines of it, which its library compares with the system's clock.
"""

LIES = ("nan", "garbage", "old", "memory")
FILE, FELT = "fault", "felt"

PRELUDE = (
    """
import datetime, errno, os, pathlib, threading, time
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")  # as the node itself does
from moehive.expert_node import cache, executor, identity, plain, service
from moehive.proto import experts_pb2 as pb
_file = pathlib.Path(sys.argv[sys.argv.index("--state-dir") + 1]) / "{FILE}"
_fault = ""
def _look():
    global _fault
    _fault = _file.read_text() if _file.exists() else ""
def _watch():
    while True:
        time.sleep(0.05)
        try:
            _look()
        except OSError:
            pass  # it has just gone
_look()
threading.Thread(target=_watch, daemon=True).start()

_compute, _pieces = executor.Executor.compute, service.reply_pieces
def _computed(*arguments, **keywords):
    if _fault == "memory":
        raise MemoryError("no memory is left")
    rows, elapsed = _compute(*arguments, **keywords)
    if _fault == "nan":
        rows = rows * float("nan")
    return rows, elapsed
def _written(reply, *arguments, **keywords):
    if _fault == "old":
        reply.id -= 1
    pieces = _pieces(reply, *arguments, **keywords)
    if _fault == "garbage":  # the rows, once more and too short: the last ones count
        pieces = (*pieces, bytes((pb.ComputeReply.VALUES_FIELD_NUMBER << 3 | 2, 3)), b"cut")
    return pieces
executor.Executor.compute, service.reply_pieces = _computed, _written
_answer = plain.PlainRequests.answer
plain.PlainRequests.answer = lambda *arguments: None if _fault in {LIES} else _answer(*arguments)

class _Disk:
    def __init__(self, file):
        self._file = file
        self.close = file.close
    def write(self, data):
        if _fault == "disk full":
            _file.with_name("{FELT}").touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)
_open = cache.PartFile.__init__
def _opened(self, *arguments, **keywords):
    _open(self, *arguments, **keywords)
    self._file = _Disk(self._file)
cache.PartFile.__init__ = _opened

class _Clock(datetime.datetime):
    @classmethod
    def now(cls, zone=None):
        if _fault != "clock":
            return datetime.datetime.now(zone)
        _file.with_name("{FELT}").touch()
        return datetime.datetime.now(zone) + datetime.timedelta(days=365)
identity.datetime = _Clock
""".replace("{LIES}", repr(LIES))
    .replace("{FILE}", FILE)
    .replace("{FELT}", FELT)
)
