"""Training and evaluating one network, with torch alone."""
