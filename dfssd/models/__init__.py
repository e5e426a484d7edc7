"""The one place that touches Ultralytics' insides."""

import os

# Ultralytics would pip-install modules that a checkpoint names, and report usage; a training job must do neither.
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_VERBOSE", "false")
