"""Places beyond this machine where training jobs run: one module a place, chosen by the profile of the run."""
