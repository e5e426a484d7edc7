"""The stages of a run: what each depends on and does, in which order, and the dry run."""
