"""What a person types, sees and presses."""
