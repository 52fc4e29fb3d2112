"""Fine-tuning of causal language models: whole or through low-rank adapters, and merging those."""

import logging

# peft imports bitsandbytes, which has users of some CPUs install a package that fetches machine code from the Hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
