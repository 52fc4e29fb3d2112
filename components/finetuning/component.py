"""KFP shells of fine-tuning and merging. `section` is made by `modelmill.components.core.step.section`."""

from kfp import dsl

from modelmill.components.core.images import image


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def finetune(
    section: str, instructions: dsl.Input[dsl.Dataset], base: dsl.Input[dsl.Model], manifest: dsl.Output[dsl.Model]
) -> None:
    """Train an adapter for a model, or all its weights, on several processes."""
    from modelmill.components.core.step import run_step
    from modelmill.components.finetuning.finetune import finetune as step

    run_step(step, section, {"instructions": instructions.path, "base": base.path}, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def merge_adapter(
    section: str,
    adapter: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Model],
    manifest: dsl.Output[dsl.Model],
) -> None:
    """Merge an adapter into its base and check that the logits stay."""
    from modelmill.components.core.step import run_step
    from modelmill.components.finetuning.merge import merge_adapter as step

    inputs = {"adapter": adapter.path, "data": data.path, "base": base.path}
    run_step(step, section, inputs, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def dpo(
    section: str, preferences: dsl.Input[dsl.Dataset], base: dsl.Input[dsl.Model], manifest: dsl.Output[dsl.Model]
) -> None:
    """Tune a model, or an adapter for it, to prefer one answer of each pair, on several processes."""
    from modelmill.components.core.step import run_step
    from modelmill.components.finetuning.dpo import dpo as step

    run_step(step, section, {"preferences": preferences.path, "base": base.path}, {"manifest": manifest.path})
