"""What a cluster needs besides the runs themselves: see docs/operations.md."""
