"""Container images: one Dockerfile a family, all built by `python -m images.build`."""
