"""Hidden states between host memory and the device: on CUDA through pinned memory, beside the computation."""

import torch
from torch import Tensor


class Transfer:
    """Copies for one walk of a stream through a block. On a CPU every copy is made when it is asked for.

    On CUDA the next batch is uploaded, and the last one downloaded, on streams of their own while the block runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lanes = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None
        self._ahead: dict[int, tuple[Tensor, Tensor, torch.cuda.Event]] = {}  # by id of the host tensor, which is kept

    def prefetch(self, hidden: Tensor) -> None:
        """Begin to upload a batch that `upload` will be asked for next."""
        if self._lanes is None:
            return
        with torch.cuda.stream(self._lanes[0]):
            copy = hidden.to(self.device, non_blocking=True)
            self._ahead[id(hidden)] = (hidden, copy, self._lanes[0].record_event())

    def upload(self, hidden: Tensor) -> Tensor:
        """A copy on the device, which the block may change in place."""
        ahead = self._ahead.pop(id(hidden), None)
        if ahead is None:
            return hidden.to(self.device, copy=True)
        _, copy, done = ahead
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        copy.record_stream(current)  # its memory is not given away before the block has used it
        return copy

    def download(self, output: Tensor) -> Tensor:
        """A copy in host memory, complete once `wait` returns."""
        if self._lanes is None:
            return output.to("cpu")
        host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
        lane = self._lanes[1]
        lane.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(lane):
            host.copy_(output, non_blocking=True)
        output.record_stream(lane)
        return host

    def wait(self) -> None:
        """Until all downloads are complete."""
        if self._lanes is not None:
            self._lanes[1].synchronize()
