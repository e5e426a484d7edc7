"""YOLO as a model family: the one place that touches the insides of Ultralytics."""
