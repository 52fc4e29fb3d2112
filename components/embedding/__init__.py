"""Embedding models: pairs of texts that belong together, fine-tuning on them, and held-out retrieval."""
