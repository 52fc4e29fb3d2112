"""Recipe types, one file a pipeline, and the recipes that ship: laptop, GPU and Trainium."""
