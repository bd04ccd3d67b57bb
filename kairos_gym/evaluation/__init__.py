"""What is measured: dreams and plans against the real simulator."""
