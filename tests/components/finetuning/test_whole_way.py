"""From a model of our own and records in a file to an adapter and a merged model, with a rank killed on the way."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from modelmill.components.core.manifest import Manifest
from modelmill.components.core.step import StepResult
from modelmill.components.core.weights import weights_digest
from modelmill.components.data.instruction_config import InstructionsConfig
from modelmill.components.data.instructions import prepare_instructions
from modelmill.components.finetuning.config import MergeConfig
from modelmill.components.finetuning.finetune import MODULE, finetune
from modelmill.components.finetuning.merge import merge_adapter
from modelmill.components.llama.config import LlamaConfig
from modelmill.components.llama.huggingface import export_huggingface
from modelmill.components.llama.model import LlamaDecoder
from modelmill.components.training.launch import RankFailedError
from tests.components.finetuning.samples import finetune_config
from tests.components.training.samples import MODEL

STEPS, LENGTH = 60, 48


def described(result: StepResult, folder: Path) -> Manifest:
    return Manifest.describe(
        folder, kind=result.kind, counts=result.counts, metrics=result.metrics, metadata=result.metadata
    )


def own_model(folder: Path) -> Manifest:
    """What the pretraining step leaves: `model/` with a byte-level tokenizer that has a chat template."""
    files = folder.parent / "tokenizer"
    files.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(["<eos>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    tokenizer.save(str(files / "tokenizer.json"))
    template = (
        "{% for message in messages %}{{ '# ' if message.role == 'user' else '' }}{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + '<eos>' }}{% endgeneration %}{% else %}{{ message.content + '\n' }}"
        "{% endif %}{% endfor %}"
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    (files / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    config = LlamaConfig.model_validate({**MODEL, "vocab_size": len(vocabulary), "max_sequence_length": LENGTH})
    export_huggingface(LlamaDecoder(config, seed=1), folder / "model", tokenizer_folder=files)
    digest = weights_digest(folder / "model")
    counts = {"vocab_size": len(vocabulary)}
    return Manifest.describe(folder, kind="model", counts=counts, metadata={"weights_digest": digest})


def kill_a_rank_in(scratch: Path) -> None:
    """SIGKILL for the second rank once the run is past its first checkpoint."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        time.sleep(0.01)
        path = scratch / "history.jsonl"
        if path.exists() and len(path.read_text().splitlines()) > STEPS // 3:
            ranks = [p for p in psutil.Process().children(recursive=True) if MODULE in p.cmdline()[-3:]]
            next(rank for rank in ranks if rank.environ().get("RANK") == "1").kill()
            return


@pytest.mark.slow
def test_from_records_to_a_merged_model(home: object, tmp_path: Path) -> None:
    base = own_model(tmp_path / "base")
    records = tmp_path / "records.jsonl"
    pairs = [{"prompt": f"{a} and {b}", "completion": str(a + b)} for a in range(20) for b in range(20)]
    records.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    section = {"type": "files", "paths": [str(records)], "records": {"format": "completion"}}
    data = tmp_path / "instructions"
    data.mkdir()
    prepared = InstructionsConfig.model_validate({"source": section, "sequence_length": LENGTH})
    tokenizer = Manifest.describe(tmp_path / "tokenizer", kind="tokenizer", counts=base.counts)
    instructions = described(prepare_instructions(prepared, data, tokenizer=tokenizer), data)

    config = finetune_config(
        steps=STEPS,
        checkpoint_every=7,
        validate_every=None,
        adapter={"rank": 4, "dropout": 0.1},
        parallel={"processes_per_node": 2, "shard": 2},
    )
    outputs = {name: tmp_path / name / "data" for name in ("whole", "killed")}
    for output in outputs.values():
        output.mkdir(parents=True)
    whole = finetune(config, outputs["whole"], instructions=instructions, base=base)
    killer = threading.Thread(target=kill_a_rank_in, args=(tmp_path / "killed",))
    killer.start()
    with pytest.raises(RankFailedError, match="rank 1 of 2 failed: killed by SIGKILL"):
        finetune(config, outputs["killed"], instructions=instructions, base=base)
    killer.join()
    killed = finetune(config, outputs["killed"], instructions=instructions, base=base)
    for name in ("history.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (outputs["killed"] / name).read_bytes() == (outputs["whole"] / name).read_bytes()
    assert killed.metadata == whole.metadata
    assert whole.metrics["train_loss"] < 5.4 < math.log(base.counts["vocab_size"])

    output = tmp_path / "merged" / "data"
    output.mkdir(parents=True)
    adapter = described(whole, outputs["whole"])
    result = merge_adapter(MergeConfig(), output, adapter=adapter, data=instructions, base=base)
    assert result.metrics["stored_difference"] <= 1e-5
    assert (output / "model" / "tokenizer.json").exists()
