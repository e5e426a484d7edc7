"""From unlabelled images to pseudo-labels."""
