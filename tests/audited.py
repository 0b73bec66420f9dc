"""The model that the tests of audits look at, and how long its audits take."""

SHAPE, CLASSES, WIDTH = (1, 8, 8), 5, 40
QUICK = {"trial_limit": 0.2, "time_limit": 5}
