"""The configuration and all that can be said of it without running anything."""
