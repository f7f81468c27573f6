"""Numbers that come to the host without stopping the device, or the host before it wants them."""

from __future__ import annotations

import torch
from torch import Tensor


class OnTheWay:
    """Numbers that are copied to the host while the device, and the host, go on."""

    def __init__(self, numbers: Tensor):
        self.host, self.copied = numbers, None
        if numbers.is_cuda:
            self.host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.host.copy_(numbers, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def on_host(self) -> list:
        """The numbers; waits for them alone, not for what was enqueued after them."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.host.tolist()
