"""Dreams as Gymnasium, vector and Stable-Baselines3 environments."""
