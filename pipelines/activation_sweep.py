"""Compare the activation memory modes of a model.

The parameter is the step's section of the recipe, as `modelmill.components.core.step.section` writes it.
"""

from kfp import dsl

from modelmill.components.llama import component as llama


@dsl.pipeline(name="activation-sweep", description="Compare the activation memory modes of a model.")
def activation_sweep(activation_sweep: str) -> None:
    """One step: every mode in a process of its own."""
    llama.activation_sweep(section=activation_sweep)
