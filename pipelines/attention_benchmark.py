"""Compare the attention kernels of a machine.

The parameter is the step's section of the recipe, as `modelmill.components.core.step.section` writes it.
"""

from kfp import dsl

from modelmill.components.llama import component as llama


@dsl.pipeline(name="attention-benchmark", description="Compare the attention kernels of a machine.")
def attention_benchmark(benchmark_attention: str) -> None:
    """One step: every kernel present on every shape."""
    llama.benchmark_attention(section=benchmark_attention)
