"""The training engine: launch, accelerator, loop, optimizer, checkpoint, memory."""
