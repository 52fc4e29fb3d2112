"""Data preparation: corpus, tokenizer, packed tokens and the loader that reads them."""
