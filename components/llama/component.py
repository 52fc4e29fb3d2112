"""KFP shells of the steps that train and measure. `section` is made by `modelmill.components.core.step.section`."""

from kfp import dsl

from modelmill.components.core.images import image


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def pretrain(
    section: str,
    tokenizer: dsl.Input[dsl.Artifact],
    tokens: dsl.Input[dsl.Dataset],
    manifest: dsl.Output[dsl.Model],
) -> None:
    """Train a Llama decoder from random weights on several processes."""
    from modelmill.components.core.step import run_step
    from modelmill.components.llama.pretrain import pretrain as step

    run_step(step, section, {"tokenizer": tokenizer.path, "tokens": tokens.path}, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def continue_pretraining(
    section: str,
    base: dsl.Input[dsl.Model],
    corpus: dsl.Input[dsl.Dataset],
    tokens: dsl.Input[dsl.Dataset],
    manifest: dsl.Output[dsl.Model],
) -> None:
    """Train a Llama further from finished weights, on several processes."""
    from modelmill.components.core.step import run_step
    from modelmill.components.llama.continue_pretraining import continue_pretraining as step

    inputs = {"base": base.path, "corpus": corpus.path, "tokens": tokens.path}
    run_step(step, section, inputs, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def benchmark_attention(section: str, manifest: dsl.Output[dsl.Artifact]) -> None:
    """Compare the attention kernels of the machine the step runs on."""
    from modelmill.components.core.step import run_step
    from modelmill.components.llama.benchmark_attention import benchmark_attention as step

    run_step(step, section, {}, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def activation_sweep(section: str, manifest: dsl.Output[dsl.Artifact], report: dsl.Output[dsl.HTML]) -> None:
    """Compare the activation memory modes of a model on the machine the step runs on."""
    from modelmill.components.core.step import run_step
    from modelmill.components.llama.activation_sweep import activation_sweep as step

    run_step(step, section, {}, {"manifest": manifest.path, "report.html": report.path})
