"""What all recorded runs say together."""
