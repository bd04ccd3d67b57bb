"""Policies: a ladder from doing nothing to skilled, clones, and those that learn."""
