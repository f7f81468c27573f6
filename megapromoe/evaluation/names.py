"""What evaluations are asked for by, for those who check it without torch."""

CLASSIFIERS = ("digits", "fashion_mnist")  # feature networks that are trained on the spot, each on the data of its name
CLASSIFIER_FEATURES = 112  # the most of their features that are compared, as many as a covariance needs images
DATA = "data"  # the reference that is what the run trains on
