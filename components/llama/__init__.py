"""The Llama decoder: its configuration, the module, and exchange with Hugging Face checkpoints."""
