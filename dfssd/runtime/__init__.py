"""What every stage stands on: storage, artefacts, tracking, progress, Ray, the worker group."""
