"""What to expect before anything is measured: memory, curves, what binds."""
