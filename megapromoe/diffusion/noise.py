"""Counter-based random numbers: a value depends only on (seed, purpose, position), not on the rank or the order.

Philox is a keyed permutation of a counter. The key is a hash of the seed and the purpose ("noise", "time", ...). Each
position has a fixed block of counters, so the numbers of any positions can be computed separately, in any order and on
any rank; consecutive positions need one vectorised call.

Normals are computed by Box-Muller, which uses a fixed number of bits for each value. A rejection method such as the
ziggurat uses a varying number, so that one position could need the counters of the next.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x64-10), by
numpy.random.Philox.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch

WORDS_PER_COUNTER = 4  # Philox4x64: one counter value yields four 64-bit words


def raw_bits(seed: int, purpose: str, positions_B: np.ndarray, words: int) -> np.ndarray:
    """Returns random 64-bit words (B, words) for the given stream positions.

    Args:
        seed: any integer.
        purpose: name of the stream; different names are independent streams. Each name has one value of
            `words`.
        positions_B: non-negative int64 positions, in any order.
        words: 64-bit words of a position, at least 1.

    Raises:
        ValueError: a position is negative or `words` is not positive.
    """
    positions_B = np.asarray(positions_B, dtype=np.int64)
    if positions_B.size and positions_B.min() < 0:
        raise ValueError(f"positions must be >= 0, got {positions_B.min()} for stream {purpose!r}")
    if words < 1:
        raise ValueError(f"words must be >= 1, got {words} for stream {purpose!r}")
    key = int.from_bytes(hashlib.sha256(f"{purpose}|{seed}".encode()).digest()[:16], "little")
    counters = -(-words // WORDS_PER_COUNTER)
    bits = np.empty((len(positions_B), counters * WORDS_PER_COUNTER), dtype=np.uint64)
    breaks = np.flatnonzero(np.diff(positions_B) != 1) + 1
    for run in np.split(np.arange(len(positions_B)), breaks):
        if len(run):
            generator = np.random.Philox(key=key, counter=int(positions_B[run[0]]) * counters)
            values = generator.random_raw(len(run) * bits.shape[1])
            bits[run[0] : run[-1] + 1] = values.reshape(len(run), -1)
    return bits[:, :words]


def uniforms(seed: int, purpose: str, positions_B: np.ndarray) -> np.ndarray:
    """One float64 for each position, uniform in the open interval (0, 1)."""
    # 52 bits plus 0.5, so that the largest value, 1 - 2^-53, is a float64 below 1.
    return ((raw_bits(seed, purpose, positions_B, 1)[:, 0] >> np.uint64(12)) + 0.5) * 2.0**-52


def normals(seed: int, purpose: str, positions_B: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Independent unit normals (B, *shape), float32, for each position.

    One 64-bit word gives two values: its high half the radius, its low half the angle. They are computed in float64, so
    that the float32 result does not depend on the last digits of a machine's sine. The largest magnitude is
    sqrt(66 ln 2) = 6.76.

    Source: Box and Muller 1958.
    """
    count = math.prod(shape)
    bits = raw_bits(seed, purpose, positions_B, -(-count // 2))
    radius = np.sqrt(-2.0 * np.log(((bits >> np.uint64(32)) + 0.5) * 2.0**-32))
    angle = ((bits & np.uint64(0xFFFFFFFF)) + 0.5) * (2.0 * np.pi * 2.0**-32)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(len(bits), -1)[:, :count].reshape(-1, *shape).astype(np.float32)


def permutation(seed: int, purpose: str, position: int, size: int) -> np.ndarray:
    """A uniformly random permutation of range(size), int64, determined by (seed, purpose, position).

    It sorts raw words, because numpy keeps the words of Philox stable across versions but not `Generator.permutation`.
    """
    return np.argsort(raw_bits(seed, purpose, np.array([position]), size)[0], kind="stable")


def image_noise(seed: int, indices_B: Sequence[int], shape: Sequence[int], draw: int = 0) -> torch.Tensor:
    """Unit normals (B, *shape), float32, for generated images; they do not depend on the rest of the batch.

    Args:
        seed: `sample.seed`.
        indices_B: number of each image.
        shape: (C, H, W).
        draw: 0 for the initial noise, k for step k of a stochastic sampler.
    """
    return torch.from_numpy(normals(seed, f"image noise {draw}", np.asarray(indices_B), shape))
