"""dfssd: train a small, fast defect detector from few labels and many unlabelled images, on a Ray cluster."""

import os

# Ultralytics would pip-install what it misses in the middle of a job; it reads this when it is imported.
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_VERBOSE", "false")

__version__ = "0.1.0"
