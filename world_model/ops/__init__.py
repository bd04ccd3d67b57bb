"""The operations: each has a reference in torch, and compiled forms for a CPU and a GPU."""
