"""Experience of real simulators: recorded, and found again."""
