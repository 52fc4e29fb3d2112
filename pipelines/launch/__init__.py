"""Where a pipeline runs: here, on this machine; a cluster is another module beside it."""
