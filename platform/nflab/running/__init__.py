"""Runs on Ray: a training by Ray Train, many by Ray Tune."""
