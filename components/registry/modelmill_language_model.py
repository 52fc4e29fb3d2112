"""Loads a registered language model for `mlflow.pyfunc`; a copy of this file travels with every version.

It imports nothing of modelmill, so that whoever loads the model needs only transformers and torch. The weights are
the exported Hugging Face folder, byte for byte: no pickle is written or read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class LanguageModel:
    """A causal language model and its tokenizer, as `mlflow.pyfunc` wants them."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()

    def get_raw_model(self) -> Any:
        """The `transformers` model; MLflow returns it from `PyFuncModel.get_raw_model()`."""
        return self.model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Continue each text.

        Args:
            model_input: texts: a list, or a table whose first column holds them.
            params: `max_new_tokens` (64), `temperature` (0 takes the most likely token), `top_k` (0 means all),
                `seed`.

        Returns:
            What follows each text, without the text itself.
        """
        texts = model_input.iloc[:, 0].tolist() if hasattr(model_input, "iloc") else list(model_input)
        return [self._continue(str(text), params or {}) for text in texts]

    def _continue(self, text: str, params: dict[str, Any]) -> str:
        import torch

        tokens = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        if tokens.shape[1] == 0:  # an empty text begins a document
            tokens = torch.tensor([[self.tokenizer.eos_token_id]])
        options: dict[str, Any] = {"max_new_tokens": int(params.get("max_new_tokens", 64)), "do_sample": False}
        temperature = float(params.get("temperature", 0.0))
        if temperature > 0:
            options.update(do_sample=True, temperature=temperature, top_k=int(params.get("top_k", 50)))
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(int(params.get("seed", 0)))
            written = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        return str(self.tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True))


def _load_pyfunc(path: str) -> LanguageModel:
    """Entry point of `mlflow.pyfunc.load_model`; `path` is the folder the version was registered with."""
    folder = Path(path)
    return LanguageModel(str(folder / "model" if (folder / "model").is_dir() else folder))
