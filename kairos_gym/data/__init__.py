"""Experience of real simulators, recorded and loaded."""
