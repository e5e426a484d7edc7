"""dfssd: train a small, fast defect detector from few labels and many unlabelled images, on a Ray cluster."""

__version__ = "0.1.0"
