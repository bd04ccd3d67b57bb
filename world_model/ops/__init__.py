"""One operation a file, or a few side by side: a slow truth in torch, compiled forms for a CPU and a GPU."""
