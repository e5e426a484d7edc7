"""Manifest, images, samples and loaders; formats/ reads what people have, preparation/ makes the manifest of it."""
