"""Copies numbers to the host without stopping the device, and without the host waiting before it needs them."""

from __future__ import annotations

import torch
from torch import Tensor


class AsyncHostCopy:
    """Numbers that are copied to the host while device and host continue."""

    def __init__(self, numbers: Tensor):
        """Starts the copy of a tensor of any shape."""
        self._host, self._copied = numbers, None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def result(self) -> list:
        """The numbers as nested lists. Waits only for the copy, not for work that was enqueued after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()
