"""Whole steps of a frozen model: compiled for a CPU, captured for a GPU."""
