"""Manifest, formats, checks, groups, splits, samples."""
