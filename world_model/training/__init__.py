"""Training of a world model."""
