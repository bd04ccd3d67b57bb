"""The world model: a streaming, action-conditioned Kairos (arXiv 2606.16533) in plain torch."""
