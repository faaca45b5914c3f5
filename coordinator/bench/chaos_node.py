"""What an expert node runs before it starts when `moehive bench chaos` may turn it into a liar.

The node reads the file `lie` in its state directory twenty times a second: `nan`, `garbage`, `old` (the answer names
an earlier request), `memory` (as if there were none left), or nothing for the truth.
"""

LIES = ("nan", "garbage", "old", "memory")

PRELUDE = """
import pathlib, threading, time
from moehive.expert_node import executor, service
_file = pathlib.Path(sys.argv[sys.argv.index("--state-dir") + 1]) / "lie"
_lie = ""
def _watch():
    global _lie
    while True:
        _lie = _file.read_text() if _file.exists() else ""
        time.sleep(0.05)
threading.Thread(target=_watch, daemon=True).start()
_compute, _write = executor.Executor.compute, service.write_values
def _computed(*arguments, **keywords):
    if _lie == "memory":
        raise MemoryError("no memory is left")
    rows, elapsed = _compute(*arguments, **keywords)
    if _lie == "nan":
        rows = rows * float("nan")
    return rows, elapsed
def _written(reply, *arguments, **keywords):
    _write(reply, *arguments, **keywords)
    if _lie == "garbage":
        reply.values = reply.values[:-3]
    if _lie == "old":
        reply.id -= 1
executor.Executor.compute, service.write_values = _computed, _written
"""
