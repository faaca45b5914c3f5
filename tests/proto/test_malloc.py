"""A settled heap: in a process of its own, for what is frozen there stays so."""

import subprocess
import sys

CODE = """
import gc, weakref
from moehive.proto.malloc import settle_heap

class Loop: pass
before, dead = Loop(), Loop()
before.me = before
dead.me = dead
gone = weakref.ref(dead)
del dead
settle_heap()
assert gone() is None and gc.get_freeze_count() > 1000
assert before not in gc.get_objects()
after = Loop()
after.me = after
kept = weakref.ref(after)
del after
gc.collect()
assert kept() is None
"""


def test_what_is_there_is_not_walked_again_and_what_comes_later_is() -> None:
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
