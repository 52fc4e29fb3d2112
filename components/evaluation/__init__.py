"""Judging a model: held-out likelihood, baselines, samples, the report."""
