"""The Ray cluster: what it has, costs and waits for."""
