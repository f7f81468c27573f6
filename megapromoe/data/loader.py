"""The stream of training samples: a sample is fixed by the seed and its position in the stream.

Position p = 0, 1, 2, ... is one sample of training. Epoch p // N takes the N records in an order of its own;
noise, time, flip and label drop of position p come from counter-based random numbers. So the data state of a
run is one integer, and the stream is the same at every world size, batch size and accumulation.

Whether a label is dropped is known here, on the host: each batch is ordered [conditional | null], with the
count of the first kind beside it.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from megapromoe.data.datasets import DamagedRecords, Dataset, DatasetError
from megapromoe.diffusion.noise import normals, permutation, uniforms


@dataclass(frozen=True)
class Batch:
    """Samples of training, conditional ones first; within each kind in stream order.

    Attributes:
        clean_BCHW: images or latents, float32.
        noise_BCHW: unit normal, float32.
        u_B: uniform in (0, 1), float32: the draw that time is made from.
        labels_B: int64 class, the null class where the label was dropped.
        positions_B: int64 stream position.
        conditional: number of samples that keep their label; they come first.
        damaged: number of samples whose record could not be used; each has the next good one of its epoch instead.
    """

    clean_BCHW: torch.Tensor
    noise_BCHW: torch.Tensor
    u_B: torch.Tensor
    labels_B: torch.Tensor
    positions_B: torch.Tensor
    conditional: int
    damaged: int = 0

    def __len__(self) -> int:
        return len(self.labels_B)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The batch in page-locked memory, from which a GPU copies while the host goes on."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return replace(
            self,
            clean_BCHW=change(self.clean_BCHW),
            noise_BCHW=change(self.noise_BCHW),
            u_B=change(self.u_B),
            labels_B=change(self.labels_B),
            positions_B=change(self.positions_B),
        )


class Loader:
    """Makes the batch of any stretch of the stream.

    Args:
        dataset: what to read from.
        seed: of order, noise, time, flips and label drop.
        label_drop: probability in [0, 1] that a sample's label becomes the null class.
        flip: mirror half of the samples left to right.
        null_class: the label that means "no class"; no record may have it.
    """

    def __init__(self, dataset: Dataset, seed: int, label_drop: float, flip: bool, null_class: int):
        self.dataset = dataset
        self.seed = seed
        self.label_drop = label_drop
        self.flip = flip
        self.null_class = null_class
        # A batch touches one epoch, or two at the seam.
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(seed, "order", epoch, len(dataset)))

    def indices(self, positions_B: np.ndarray) -> np.ndarray:
        """Record at each stream position, int64."""
        epoch_B, place_B = np.divmod(positions_B, len(self.dataset))
        indices_B = np.empty_like(positions_B)
        for epoch in np.unique(epoch_B):
            indices_B[epoch_B == epoch] = self._order(int(epoch))[place_B[epoch_B == epoch]]
        return indices_B

    def batch(self, first: int, count: int) -> Batch:
        """Samples at positions first .. first + count - 1, a pure function of the two.

        Raises:
            ValueError: first is negative or count is not positive.
            DatasetError: no record can be used.
        """
        if first < 0 or count < 1:
            raise ValueError(f"a batch needs first >= 0 and count >= 1, got first {first}, count {count}")
        positions_B = np.arange(first, first + count, dtype=np.int64)
        mirror_B = uniforms(self.seed, "flip", positions_B) < 0.5 if self.flip else np.zeros(count, bool)
        clean_BCHW, labels_B, damaged = self._records(positions_B, mirror_B)
        noise_BCHW = normals(self.seed, "noise", positions_B, self.dataset.shape)
        # Rounding to float32 must not reach 1, where no time is defined.
        below_one = np.nextafter(np.float32(1), np.float32(0))
        u_B = np.minimum(uniforms(self.seed, "time", positions_B).astype(np.float32), below_one)
        drop_B = uniforms(self.seed, "label drop", positions_B) < self.label_drop
        labels_B = np.where(drop_B, self.null_class, labels_B)
        order_B = np.argsort(drop_B, kind="stable")

        def ordered(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array[order_B]))

        return Batch(
            clean_BCHW=ordered(clean_BCHW),
            noise_BCHW=ordered(noise_BCHW),
            u_B=ordered(u_B),
            labels_B=ordered(labels_B),
            positions_B=ordered(positions_B),
            conditional=count - int(drop_B.sum()),
            damaged=damaged,
        )

    def _records(self, positions_B: np.ndarray, mirror_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Images and labels at these positions, and how many stand in for records that are damaged.

        The one that stands in is the next good one of the epoch's order, on whichever rank the sample is drawn.
        """
        dataset, size = self.dataset, len(self.dataset)
        normal_BCHW = normals(self.seed, "posterior", positions_B, dataset.shape) if dataset.stochastic else None
        further_B = np.zeros_like(positions_B)
        for _ in range(size):
            epoch_B, place_B = np.divmod(positions_B, size)
            indices_B = self.indices(epoch_B * size + (place_B + further_B) % size)
            try:
                clean_BCHW = dataset.draw(indices_B, mirror_B, normal_BCHW)
            except DamagedRecords as error:
                further_B[error.rows] += 1
                told = error
            else:
                return clean_BCHW, dataset.labels[indices_B], int((further_B > 0).sum())
        raise DatasetError(f"none of {size} records can be used; {told}")

    @staticmethod
    def micro_batches(step: int, data_ranks: int, rank: int, accumulation: int, global_batch: int) -> list[range]:
        """Stream positions of each micro-batch that one data-parallel rank takes in an optimizer step.

        Step s owns positions [s·G, (s+1)·G). Accumulation cuts them into equal parts, and ranks cut each
        part: so a part, seen over all ranks, is one contiguous stretch, whatever the number of ranks.

        Args:
            step: optimizer step, from 0.
            data_ranks: size of the data-parallel group.
            rank: place in it.
            accumulation: micro-batches per step.
            global_batch: samples per step, G.

        Raises:
            ValueError: the batch does not divide, or the rank is not in the group.
        """
        if not 0 <= rank < data_ranks:
            raise ValueError(f"rank {rank} is not in 0..{data_ranks - 1}")
        size, left = divmod(global_batch, data_ranks * accumulation)
        if left or size == 0:
            raise ValueError(
                f"train.global_batch: {global_batch} is not a multiple of {data_ranks} data-parallel ranks x "
                f"{accumulation} accumulation steps = {data_ranks * accumulation}"
            )
        starts = [step * global_batch + (a * data_ranks + rank) * size for a in range(accumulation)]
        return [range(start, start + size) for start in starts]


def prefetch(
    loader: Loader, ranges: Iterable[range], workers: int = 1, pin: bool = False
) -> Generator[Batch, None, None]:
    """Batches of the given stretches of the stream, in order, the next `workers` made in as many threads meanwhile.

    Threads, because what takes time (random numbers, checksums, reading) lets go of Python's lock.

    Args:
        pin: give them in page-locked memory; needs a GPU.

    What making a batch raises, the iterator raises in that batch's turn. Closing it ends the threads.
    """
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="loader")

    def make(stretch: range) -> Batch:
        batch = loader.batch(stretch.start, len(stretch))
        return batch.pinned() if pin else batch

    try:
        ahead: deque[Future[Batch]] = deque()
        for stretch in ranges:
            ahead.append(pool.submit(make, stretch))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
