"""A pipeline of three trivial steps that behave, or misbehave, as the recipe asks."""
