"""Files of defect data, in any layout, to images with labels: a reader a format, and what the readers share."""
