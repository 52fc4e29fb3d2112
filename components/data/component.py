"""KFP shells of the data steps. `section` is made by `modelmill.components.core.step.section`."""

from kfp import dsl

from modelmill.components.core.images import image


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def ingest_corpus(section: str, manifest: dsl.Output[dsl.Dataset]) -> None:
    """Collect, clean, deduplicate and split text."""
    from modelmill.components.core.step import run_step
    from modelmill.components.data.corpus import ingest_corpus as step

    run_step(step, section, {}, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def train_tokenizer(section: str, corpus: dsl.Input[dsl.Dataset], manifest: dsl.Output[dsl.Artifact]) -> None:
    """Train a byte-level BPE tokenizer, or take an existing one."""
    from modelmill.components.core.step import run_step
    from modelmill.components.data.tokenizer import train_tokenizer as step

    run_step(step, section, {"corpus": corpus.path}, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def take_tokenizer(
    section: str, model: dsl.Input[dsl.Model], corpus: dsl.Input[dsl.Dataset], manifest: dsl.Output[dsl.Artifact]
) -> None:
    """Take over the tokenizer that a model brings along."""
    from modelmill.components.core.step import run_step
    from modelmill.components.data.tokenizer import take_tokenizer as step

    run_step(step, section, {"model": model.path, "corpus": corpus.path}, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def pack_tokens(
    section: str,
    corpus: dsl.Input[dsl.Dataset],
    tokenizer: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Dataset],
) -> None:
    """Tokenise documents and pack them into rows of fixed length."""
    from modelmill.components.core.step import run_step
    from modelmill.components.data.packing import pack_tokens as step

    run_step(step, section, {"corpus": corpus.path, "tokenizer": tokenizer.path}, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def prepare_instructions(
    section: str,
    tokenizer: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Dataset],
    corpus: dsl.Input[dsl.Dataset] = None,
) -> None:
    """Check, split and pack conversations with loss masks; with a corpus, test questions are what it held out."""
    from modelmill.components.core.step import run_step
    from modelmill.components.data.instructions import prepare_instructions as step

    inputs = {"tokenizer": tokenizer.path} | ({"corpus": corpus.path} if corpus else {})
    run_step(step, section, inputs, {"manifest": manifest.path})


@dsl.component(base_image=image("cpu"), install_kfp_package=False)
def prepare_preferences(
    section: str,
    tokenizer: dsl.Input[dsl.Artifact],
    manifest: dsl.Output[dsl.Dataset],
    corpus: dsl.Input[dsl.Dataset] = None,
) -> None:
    """Check, split and tokenise pairs of answers; with a corpus, test questions are what it held out."""
    from modelmill.components.core.step import run_step
    from modelmill.components.data.preferences import prepare_preferences as step

    inputs = {"tokenizer": tokenizer.path} | ({"corpus": corpus.path} if corpus else {})
    run_step(step, section, inputs, {"manifest": manifest.path})
