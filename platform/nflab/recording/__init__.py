"""MLflow: what is recorded of every run, and read back."""
