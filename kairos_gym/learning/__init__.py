"""Learning: world models from experience, policies in dreams, and both in turn."""
