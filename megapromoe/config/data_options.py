"""The options `data.*`: the training data."""

from dataclasses import dataclass

from megapromoe.config.reader import ONE_UP, ZERO_UP, option

UNSET = "unset"  # the value of data.source until the user chooses a source; training is refused until then
SOURCES = ("digits", "fashion_mnist", "latents", "synthetic", UNSET)
NO_DATA = (
    "no training data is chosen: give data.source=latents data.path=DIR (latents of your images, docs/data.md), or"
    " data.source=synthetic (random latents, for timing)"
)
# Image side in pixels of the sources with a fixed size; all have 1 channel and 10 classes.
FIXED_SIZES = {"digits": 8, "fashion_mnist": 32}


@dataclass(frozen=True)
class DataConfig:
    """The training data."""

    source: str = option(
        UNSET,
        "the training data: latents of your images (docs/data.md), a small data set, or random data for timing; unset:"
        " the user must choose",
        SOURCES,
    )
    path: str = option(
        "", "folder of the latents or of fashion_mnist; empty for fashion_mnist: the folder of its Debian package"
    )
    test_path: str = option("", "folder of latents for evaluation, which training does not use")
    size: int = option(65536, "synthetic: number of images", within=ONE_UP)
    condition_dropout: float = option(
        0.1, "probability that a label is replaced by the null class, for classifier-free guidance", within="[0, 1)"
    )
    condition_dropout_stratum: int = option(
        0,
        "0: each label is dropped independently of the others; n: of each n consecutive samples of the stream exactly"
        " n * condition_dropout labels are dropped (stratified), so that all micro-batches have equally many null"
        " images; must divide the images of a micro-batch",
        within=ZERO_UP,
    )
    flip: bool = option(False, "mirror each image with probability 0.5")
    seed: int = option(0, "seed of the sample stream: order, noise, time, flips and dropped conditions", within=ZERO_UP)
    workers: int = option(
        1,
        "number of threads that prepare batches on each rank, and number of batches that they prepare ahead",
        within="[1, 256]",
    )
    verify: bool = option(True, "latents: verify the checksum of each record when it is read")
    max_damaged: int = option(
        100,
        "latents: number of damaged samples, over all ranks, that the run replaces before it ends with an error",
        within=ZERO_UP,
    )
    cache: str = option(
        "",
        "latents: folder on a local disk of each node, to which the latents are copied before training; empty: no copy",
    )

    def drops_whole_numbers(self, stratum: int) -> bool:
        """Whether `condition_dropout` of `stratum` samples is a whole number, to the rounding of a decimal fraction."""
        dropped = stratum * self.condition_dropout
        return abs(dropped - round(dropped)) < 1e-9 * max(stratum, 1)

    @property
    def dropped_per_stratum(self) -> int:
        """Conditions dropped in each stratum of `condition_dropout_stratum` samples; 0 without strata."""
        return round(self.condition_dropout_stratum * self.condition_dropout)
