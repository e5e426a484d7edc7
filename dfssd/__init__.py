"""dfssd: train a small, fast defect detector from few labels and many unlabelled images, on a Ray cluster."""

import os

# Ultralytics would pip-install what it misses in the middle of a job; it reads this when it is imported.
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_VERBOSE", "false")
# It would evaluate a word of a model's layout as Python, and unpickle anything; read when it is imported, too.
os.environ.setdefault("ULTRALYTICS_SAFE_LOAD", "1")

__version__ = "0.1.0"

from dfssd.runtime.environment import set_driver_environment

set_driver_environment()  # Ray reads it when it is imported, so it is set before any module of this package can do so
