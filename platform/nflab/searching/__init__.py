"""Optuna: what is tried next, and what the tries say."""
