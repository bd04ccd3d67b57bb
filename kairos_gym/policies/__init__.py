"""Policies: a ladder from doing nothing to skilled, behaviour cloning, Stable-Baselines3's and SHAC."""
