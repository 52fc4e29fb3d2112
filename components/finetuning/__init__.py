"""Fine-tuning of causal language models: whole or through low-rank adapters, and merging those."""
