"""The Llama 2/3 decoder, its Hugging Face import and export, and the pretraining step."""
