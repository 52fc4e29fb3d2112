"""What composes steps into pipelines, and the `modelmill` command that runs them."""
