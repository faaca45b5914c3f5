"""CUDA graphs: launches that are recorded once, and then made all at once."""

from collections.abc import Callable

import torch


class Recorder:
    """Records calls as CUDA graphs, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()  # no graph leaves anything there for another

    def record(self, call: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """What `call` launches; it is not run. Kernels must have been compiled before."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            # Each thread has a handle of its own, whose memory can't be taken while launches are recorded.
            torch.cuda.current_blas_handle()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                call()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return graph
