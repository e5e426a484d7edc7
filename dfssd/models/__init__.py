"""The one place that touches Ultralytics' insides."""
