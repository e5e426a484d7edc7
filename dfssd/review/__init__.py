"""The label loop: which images are worth a label, out to where people label, and back as the next version of the data set."""
