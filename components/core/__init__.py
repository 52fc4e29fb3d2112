"""Recipes, manifests, URIs, tracking and errors: what every step and the command share.

Nothing in this package imports torch, kfp or mlflow when it is imported, and nothing is imported
here at all: import the module you need (`from modelmill.components.core.errors import UserError`).
"""
