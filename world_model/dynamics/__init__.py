"""What stands in for a world model, or wraps one, behind the same verbs."""
