"""Names in the options of an evaluation, for checks that must not import torch."""

CLASSIFIERS = ("digits", "fashion_mnist")  # feature networks that are trained when needed, on these data sets
CLASSIFIER_FEATURES = 112  # largest number of features of a classifier; a covariance needs more images
DATA = "data"  # the reference "the training data of the run"
SCENES = "scenes"  # the reference of runs on scenes: real scenes, which set the ceiling of the six tasks
NUM_TASKS = 6  # of `scene_tasks.TASKS`
RIGHT = "right pictures, "  # prefix of the scores of the six tasks: shares of pictures, 0 to 1


def higher_is_better(figure: str) -> bool:
    """Whether larger values of a metric are better; distances are better if they are small."""
    return figure.startswith(RIGHT)
