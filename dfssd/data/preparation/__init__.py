"""From a source to the manifest: checks, near-duplicates, splits, the labelled subset, versions, corrections."""
