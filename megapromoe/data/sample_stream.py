"""The stream of training samples: a sample depends on the seed and on its position in the stream only.

Position p = 0, 1, 2, ... is one training sample. Epoch p // N visits the N records in a random order. The noise, time,
flip and condition dropout of position p come from counter-based random numbers. So the data state of a run is one
integer, and the stream is the same for every world size, batch size and accumulation.

Condition dropout is decided on the host, when a batch is built: batches are ordered [conditional | null], and
`num_conditional` gives the size of the first part.

Stratified dropout drops a fixed number of conditions in each stratum of n consecutive positions, [0, n), [n, 2n), ...
Every position is still dropped with the same probability, but two of one stratum are no longer independent. If n
divides the micro-batch, all micro-batches have equally many null samples. Strata depend on neither ranks nor
accumulation, so every layout drops the same samples.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from megapromoe.data.caption_batches import CaptionBatch, CaptionSource
from megapromoe.data.datasets import DamagedRecords, Dataset, DatasetError
from megapromoe.data.teacher import TeacherFeatures
from megapromoe.diffusion.noise import normals, permutation, uniforms


@dataclass(frozen=True)
class Batch:
    """A batch of training samples: first the conditional ones, then those of the null class, each in stream order.

    Attributes:
        clean_BCHW: images or latents, float32.
        noise_BCHW: unit normal noise, float32.
        u_B: uniform random number in (0, 1), float32, from which the diffusion time is computed.
        labels_B: class, int64; the null class if the label was dropped.
        positions_B: stream position, int64.
        num_conditional: number of samples that keep their label; they come first.
        damaged: number of samples whose record could not be used and was replaced by the next good one of its epoch.
        captions: text features, if the stream has captions; those of the null class have no tokens.
        teacher_BWHW: the teacher's features of the images, float16, if the stream has some.
    """

    clean_BCHW: torch.Tensor
    noise_BCHW: torch.Tensor
    u_B: torch.Tensor
    labels_B: torch.Tensor
    positions_B: torch.Tensor
    num_conditional: int
    damaged: int = 0
    captions: CaptionBatch | None = None
    teacher_BWHW: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels_B)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The batch in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return replace(
            self,
            clean_BCHW=change(self.clean_BCHW),
            noise_BCHW=change(self.noise_BCHW),
            u_B=change(self.u_B),
            labels_B=change(self.labels_B),
            positions_B=change(self.positions_B),
            captions=None if self.captions is None else self.captions.each(change),
            teacher_BWHW=None if self.teacher_BWHW is None else change(self.teacher_BWHW),
        )


class SampleStream:
    """Builds the batch of any index range of the stream.

    Args:
        dataset: the records.
        seed: seed of order, noise, time, flips and condition dropout.
        condition_dropout: probability in [0, 1] that a sample's label is replaced by the null class.
        flip: mirror half of the samples left to right.
        null_class: the label that means "no class"; no record may have it.
        captions: text features of the records, which are dropped together with the labels; None: without.
        dropout_stratum: samples of a stratum, of which `condition_dropout` are dropped, a whole number; 0: each sample
            is dropped independently.
        teacher: the teacher's features of the records; None: without.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int,
        condition_dropout: float,
        flip: bool,
        null_class: int,
        captions: CaptionSource | None = None,
        dropout_stratum: int = 0,
        teacher: TeacherFeatures | None = None,
    ):
        self.dataset = dataset
        self.seed = seed
        self.condition_dropout = condition_dropout
        self.flip = flip
        self.null_class = null_class
        self.captions = captions
        self.dropout_stratum = dropout_stratum
        self.teacher = teacher
        # A batch lies in one epoch, or in two at the end of an epoch.
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(seed, "order", epoch, len(dataset)))

    def indices(self, positions_B: np.ndarray) -> np.ndarray:
        """The record index of each stream position, int64 (B,)."""
        epoch_B, place_B = np.divmod(positions_B, len(self.dataset))
        indices_B = np.empty_like(positions_B)
        for epoch in np.unique(epoch_B):
            indices_B[epoch_B == epoch] = self._order(int(epoch))[place_B[epoch_B == epoch]]
        return indices_B

    def batch(self, first: int, count: int) -> Batch:
        """The samples at positions first to first + count - 1; a pure function of the two.

        Raises:
            ValueError: first is negative or count is not positive.
            DatasetError: no record of the data set can be used.
        """
        if first < 0 or count < 1:
            raise ValueError(f"a batch needs first >= 0 and count >= 1, got first {first}, count {count}")
        positions_B = np.arange(first, first + count, dtype=np.int64)
        mirror_B = uniforms(self.seed, "flip", positions_B) < 0.5 if self.flip else np.zeros(count, bool)
        drop_B = self._dropped(positions_B)
        clean_BCHW, labels_B, captions, teacher_BWHW, damaged = self._records(positions_B, mirror_B, drop_B)
        noise_BCHW = normals(self.seed, "noise", positions_B, self.dataset.shape)
        # Rounding to float32 must not give 1, for which the time is not defined.
        below_one = np.nextafter(np.float32(1), np.float32(0))
        u_B = np.minimum(uniforms(self.seed, "time", positions_B).astype(np.float32), below_one)
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
            num_conditional=count - int(drop_B.sum()),
            damaged=damaged,
            captions=None if captions is None else captions.each(lambda tensor: tensor[torch.from_numpy(order_B)]),
            teacher_BWHW=None if teacher_BWHW is None else ordered(teacher_BWHW),
        )

    def _dropped(self, positions_B: np.ndarray) -> np.ndarray:
        """Whether the condition of each of some consecutive stream positions is dropped, bool (B,)."""
        size = self.dropout_stratum
        if not size:
            return uniforms(self.seed, "label drop", positions_B) < self.condition_dropout
        first = positions_B[0] // size * size
        stop = (positions_B[-1] // size + 1) * size
        # The positions with the smallest numbers of their stratum: all choices are equally probable.
        numbers = uniforms(self.seed, "label drop", np.arange(first, stop, dtype=np.int64)).reshape(-1, size)
        order = np.argsort(numbers, axis=1, kind="stable")[:, : round(size * self.condition_dropout)]
        dropped = np.zeros(numbers.shape, dtype=bool)
        np.put_along_axis(dropped, order, True, axis=1)
        return dropped.ravel()[positions_B - first]

    def _records(
        self, positions_B: np.ndarray, mirror_B: np.ndarray, drop_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, CaptionBatch | None, np.ndarray | None, int]:
        """Images, labels, captions and teacher's features at these positions; the number of damaged records replaced.

        A damaged record is replaced by the next good one in the order of the epoch, which does not depend on the rank.
        """
        dataset, size = self.dataset, len(self.dataset)
        normal_BCHW = normals(self.seed, "posterior", positions_B, dataset.shape) if dataset.stochastic else None
        offset_B = np.zeros_like(positions_B)
        for _ in range(size):
            epoch_B, place_B = np.divmod(positions_B, size)
            indices_B = self.indices(epoch_B * size + (place_B + offset_B) % size)
            try:
                clean_BCHW = dataset.sample(indices_B, mirror_B, normal_BCHW)
                captions = self.captions.batch(indices_B, drop_B) if self.captions is not None else None
                teacher = self.teacher.sample(indices_B, mirror_B, None) if self.teacher is not None else None
            except DamagedRecords as error:
                offset_B[error.rows] += 1
                problem = error
            else:
                features = None if teacher is None else teacher.astype(np.float16)  # as they are stored
                return clean_BCHW, dataset.labels[indices_B], captions, features, int((offset_B > 0).sum())
        raise DatasetError(f"none of {size} records can be used; {problem}")

    @staticmethod
    def micro_batches(step: int, data_ranks: int, rank: int, accumulation: int, global_batch: int) -> list[range]:
        """The index ranges of the stream for the micro-batches of one data-parallel rank in an optimizer step.

        Step s uses positions [s·G, (s+1)·G). They are divided into equal parts by accumulation, and each part into
        equal ranges by rank. So a micro-batch over all ranks is one contiguous index range for any number of ranks.

        Args:
            step: optimizer step, from 0.
            data_ranks: size of the data-parallel group.
            rank: rank in this group.
            accumulation: micro-batches per step.
            global_batch: samples per step, G.

        Raises:
            ValueError: the global batch is not divisible, or the rank is not in the group.
        """
        if not 0 <= rank < data_ranks:
            raise ValueError(f"rank {rank} is not in 0..{data_ranks - 1}")
        size, remainder = divmod(global_batch, data_ranks * accumulation)
        if remainder or size == 0:
            raise ValueError(
                f"train.global_batch: {global_batch} is not a multiple of {data_ranks} data-parallel ranks x "
                f"{accumulation} accumulation steps = {data_ranks * accumulation}"
            )
        starts = [step * global_batch + (a * data_ranks + rank) * size for a in range(accumulation)]
        return [range(start, start + size) for start in starts]


def prefetch(
    stream: SampleStream, ranges: Iterable[range], workers: int = 1, pin: bool = False
) -> Generator[Batch, None, None]:
    """Yields the batches of the given index ranges in order, and builds the next `workers` batches in threads.

    Threads suffice, because the slow parts (random numbers, checksums, reading) release Python's global lock.

    Args:
        stream: the samples.
        ranges: index ranges of the stream, one per batch.
        workers: number of threads, and of batches that are built ahead.
        pin: put the batches into page-locked memory; needs a GPU.

    An exception from building a batch is raised when that batch is due. Closing the generator ends the threads.
    """
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="loader")

    def build(index_range: range) -> Batch:
        batch = stream.batch(index_range.start, len(index_range))
        return batch.pinned() if pin else batch

    try:
        pending: deque[Future[Batch]] = deque()
        for index_range in ranges:
            pending.append(pool.submit(build, index_range))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
