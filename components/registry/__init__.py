"""The model registry: what goes in, under which version and alias."""
