"""A function on fixed tensors that a CUDA graph replays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Replayed:
    """Calls `function`, from the second call on as a replayed CUDA graph where `device` is a GPU.

    function: takes what it works on from tensors that stay where they are, changes them in place, and reads nothing of
    the device. What it returns is overwritten by the next call. The first call runs it as it is, on another stream:
    that compiles kernels and allocates what libraries keep, which cannot be captured.

    refuse: told, once, why the device captures no graph of it; from then on every call runs it as it is.
    """

    def __init__(self, function: Callable[[], Tensor], device: torch.device, refuse: Callable[[str], None]):
        self._function, self._device, self._refuse = function, device, refuse
        self._graph: torch.cuda.CUDAGraph | None = None
        self._out: Tensor | None = None
        self._warm, self._plain = False, device.type != "cuda"
        self.capturing = False  # now, when what the function asks the device for is not done

    @property
    def captured(self) -> bool:
        """Whether calls are replays."""
        return self._graph is not None

    def __call__(self) -> Tensor:
        if not self._plain and not self._warm:
            return self._warmed_up()
        if not self._plain and self._graph is None:
            self._capture()
        if self._graph is None:
            return self._function()
        self._graph.replay()
        assert self._out is not None
        return self._out

    def _warmed_up(self) -> Tensor:
        stream, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        aside.wait_stream(stream)
        with torch.cuda.stream(aside):
            out = self._function()
        stream.wait_stream(aside)
        out.record_stream(stream)
        self._warm = True
        return out

    def _capture(self) -> None:
        graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)
        self.capturing = True
        try:
            # the outer context puts the stream back where the capture's own leaves by an error
            with torch.cuda.stream(aside), torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                self._out = self._function()
        except RuntimeError as error:
            torch.cuda.synchronize(self._device)
            self._plain = True
            self._refuse(f"no CUDA graph can be made of the step: {str(error).splitlines()[0]}")
            return
        finally:
            self.capturing = False
        self._graph = graph
