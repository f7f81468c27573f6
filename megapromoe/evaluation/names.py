"""Names in the options of an evaluation, for checks that must not import torch."""

CLASSIFIERS = ("digits", "fashion_mnist")  # feature networks that are trained when needed, on these data sets
CLASSIFIER_FEATURES = 112  # largest number of features of a classifier; a covariance needs more images
DATA = "data"  # the reference "the training data of the run"
