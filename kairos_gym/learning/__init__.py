"""What learns: world models from experience, policies in dreams, both by turns."""
