"""A CUDA graph without CUDA: launches of interpreted kernels, and torch's calls between them, that are made again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction


class Tape(TorchDispatchMode):
    """What a CUDA graph does, without CUDA: the same calls with the same arguments, on the same memory.

    Fails on what a graph can't hold: results or shapes that depend on numbers, and tensors made of Python's numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []
        self.in_kernel = False
        self._played = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.in_kernel:  # the interpreter's own
            return result
        assert torch.Tag.data_dependent_output not in func.tags, f"{func} reads numbers back"
        assert torch.Tag.dynamic_output_shape not in func.tags, f"{func} has a shape that depends on numbers"
        assert func is not torch.ops.aten.lift_fresh.default, "a tensor is made of numbers in main memory"
        mine = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        if any(result.untyped_storage().data_ptr() == one.untyped_storage().data_ptr() for one in mine):
            if func._schema.is_mutable:
                self.calls.append(partial(func, *args, **kwargs))
        elif not func.name().startswith("aten::empty"):
            self.calls.append(lambda: result.copy_(func(*args, **kwargs)))
        return result

    def replay(self) -> None:
        if self._played:  # the first time it was run while it was recorded
            for call in self.calls:
                call()
        self._played = True


class TapeRecorder:
    """Stands for kernels/gpu/graphs.py's Recorder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tapes: list[Tape] = []
        self._recording: Tape | None = None
        run = InterpretedFunction.run

        def taped(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            tape = self._recording
            if tape is None:
                return run(kernel, *args, **kwargs)
            tape.calls.append(partial(run, kernel, *args, **kwargs))
            tape.in_kernel = True
            result = run(kernel, *args, **kwargs)
            tape.in_kernel = False
            return result

        monkeypatch.setattr(InterpretedFunction, "run", taped)

    def record(self, call: Callable[[], None]) -> Tape:
        self._recording = tape = Tape()
        with tape:
            call()
        self._recording = None
        self.tapes.append(tape)
        return tape
