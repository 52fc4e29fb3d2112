"""The sections of a recipe that judge: held-out text, generations, and the gate between two models."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from modelmill.components.core.recipe import Section


class EvaluationConfig(Section):
    """How a model is judged on held-out text."""

    max_rows: int | None = Field(
        default=1024, ge=1, description="Test rows to score, evenly spaced over the split; null scores all of them."
    )
    batch_size: int = Field(default=8, ge=1, description="Rows a forward pass; it changes memory and speed only.")
    baseline_tokens: int = Field(
        default=100_000_000, ge=1, description="Training tokens the n-gram baselines count at most."
    )
    prompts: tuple[str, ...] = Field(
        default=(), description="Texts to continue; empty takes beginnings of held-out documents."
    )
    num_prompts: int = Field(
        default=4, ge=0, le=64, description="Held-out beginnings to continue when no prompt is given."
    )
    prompt_tokens: int = Field(default=16, ge=1, description="Tokens of a held-out document shown to the model.")
    num_samples: int = Field(
        default=1, ge=0, le=16, description="Sampled continuations of each prompt, besides the greedy one."
    )
    max_new_tokens: int = Field(default=64, ge=1, description="Length of a continuation, unless the text ends before.")
    temperature: float = Field(default=0.8, gt=0, le=10, description="Divides the logits before sampling.")
    top_k: int | None = Field(default=50, ge=1, description="Sample among the k most likely tokens; null among all.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the sampled continuations.")


class ModelUseConfig(Section):
    """How a language model runs in an evaluation."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the model runs; auto takes a GPU where there is one."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="What the weights are held and multiplied in; auto is fp32 on a CPU and the checkpoint's own on a"
        " GPU.",
    )
    batch_tokens: int = Field(
        default=16_384,
        ge=1,
        description="Tokens held at once, padding and room for new ones included; it changes memory and speed, and"
        " results by rounding alone.",
    )


class GenerateConfig(ModelUseConfig):
    """How a model answers the prompts of prepared conversations."""

    split: Literal["validation", "test"] = Field(default="test", description="Whose conversations are answered.")
    max_examples: int | None = Field(
        default=None, ge=1, description="Conversations, evenly spaced over the split; null answers all of them."
    )
    max_new_tokens: int = Field(default=256, ge=1, description="Tokens of an answer that does not end before.")
    temperature: float = Field(
        default=0.0, ge=0, le=10, description="Divides the logits before a draw; 0 takes the most likely token."
    )
    top_k: int | None = Field(default=None, ge=1, description="Draw among the k most likely tokens; null among all.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Draw among the fewest tokens that have this probability together."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the draws; each example has draws of its own.")
    preview_examples: int = Field(default=5, ge=0, le=100, description="Answers shown in samples.md, evenly spaced.")

    @model_validator(mode="after")
    def _greedy_draws_nothing(self) -> Self:
        if self.temperature == 0 and (self.top_k is not None or self.top_p != 1):
            raise ValueError(
                "temperature: 0 takes the most likely token and draws nothing; set it above 0, or leave out top_k and"
                " top_p"
            )
        return self

    def decoding(self) -> dict[str, Any]:
        """What the answers depend on besides model and prompts; without draws their settings say nothing."""
        names = {"max_new_tokens", "temperature"} | ({"top_k", "top_p", "seed"} if self.temperature else set())
        return self.model_dump(mode="json", include=names)


class LikelihoodConfig(ModelUseConfig):
    """How likely a model finds given texts."""

    split: Literal["validation", "test"] = Field(default="test", description="Which split is scored.")
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="Confidence of the bootstrap intervals.")
    resamples: int = Field(default=2000, ge=100, le=1_000_000, description="Bootstrap resamples of the examples.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the resamples.")


class AnswerScoresConfig(LikelihoodConfig):
    """How likely a model finds the reference answers of prepared conversations."""

    max_examples: int | None = Field(
        default=None, ge=1, description="Conversations, evenly spaced over the split; null scores all of them."
    )


class TextScoresConfig(LikelihoodConfig):
    """How likely a model finds the documents of a corpus."""

    max_documents: int | None = Field(
        default=512, ge=1, description="Documents, evenly spaced over the split; null scores all of them."
    )
    window_tokens: int | None = Field(
        default=2048,
        ge=2,
        description="Tokens of a document that the model sees at once; null, and at most, all its positions.",
    )


Metric = Literal["rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match", "token_f1", "chrf", "chrf_plus_plus"]


class BertScoreConfig(Section):
    """BERTScore with an encoder from a folder, without the rescaling to a baseline, which every encoder needs anew."""

    encoder: str = Field(description="Folder of a transformers encoder: config, safetensors and tokenizer.")
    layer: int | None = Field(
        default=None, ge=0, description="Hidden states to compare: those after this many blocks; null takes the last."
    )
    idf: bool = Field(default=False, description="Weigh tokens by how rare they are among the references.")
    batch_size: int = Field(default=32, ge=1, description="Pairs a forward pass; it changes memory and speed only.")
    max_length: int | None = Field(
        default=None, ge=3, description="Tokens read of a text; null takes what the encoder can read."
    )


class GenerationScoresConfig(Section):
    """How generated texts are scored against their references."""

    metrics: tuple[Metric, ...] = Field(
        default=("rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match", "token_f1", "chrf"),
        min_length=1,
        description="Metrics of overlap; ROUGE means its F-measure, chrF runs from 0 to 100, the others from 0 to 1.",
    )
    use_stemmer: bool = Field(default=True, description="Let ROUGE compare words by their Porter stems.")
    bertscore: BertScoreConfig | None = Field(default=None, description="Adds BERTScore; null leaves it out.")
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="Confidence of the bootstrap intervals.")
    resamples: int = Field(default=2000, ge=100, le=1_000_000, description="Bootstrap resamples of the examples.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the resamples.")
    num_examples: int = Field(
        default=6, ge=0, le=100, description="Examples in the report, evenly spaced from the worst to the best."
    )

    @model_validator(mode="after")
    def _metrics_once(self) -> Self:
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics: {', '.join(self.metrics)} names one twice; name each once")
        return self

    def fingerprint(self) -> str:
        """Names, sizes and times of the encoder's files; empty without BERTScore.

        Raises:
            UserError: the encoder's folder does not exist.
        """
        if self.bertscore is None:
            return ""
        from modelmill.components.data.files import folder_state
        from modelmill.components.evaluation.encoder_folder import encoder_folder

        return folder_state(encoder_folder(self.bertscore.encoder))


class GuardConfig(Section):
    """A metric that the candidate must not lose, whatever it gains."""

    metric: str = Field(min_length=1, description="Name of a score that both sides have.")
    direction: Literal["higher", "lower"] = Field(default="higher", description="Which values are better.")
    max_drop: float = Field(
        ge=0, allow_inf_nan=False, description="Largest loss that is accepted, in the metric's own unit."
    )
    examples: Literal["same", "other"] = Field(
        default="same",
        description="Where the metric is looked up: same as the gate's own, or in the scores given for guards, such as"
        " those on the task the base was made for.",
    )


class GateConfig(Section):
    """What a candidate must show against the reference before it is promoted."""

    metric: str = Field(min_length=1, description="Name of the score to compare, such as rougeLsum.")
    direction: Literal["higher", "lower"] = Field(default="higher", description="Which values are better.")
    margin: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="By how much more than this the candidate must be better, in the metric's own unit.",
    )
    tie: Literal["fail", "pass"] = Field(
        default="fail", description="What to decide where the test shows neither more nor less than the margin."
    )
    test: Literal["permutation", "bootstrap"] = Field(
        default="permutation", description="Paired test: random signs of the differences, or resampled examples."
    )
    confidence: float = Field(
        default=0.95, gt=0.5, lt=1, description="One-sided confidence of the decision, of each guard and each bound."
    )
    resamples: int = Field(default=10_000, ge=100, le=1_000_000, description="Arrangements or resamples drawn.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the draws.")
    guards: tuple[GuardConfig, ...] = Field(
        default=(), description="Metrics that must not fall; each must be shown to lose less than it may."
    )
    candidate_name: str = Field(default="fine-tuned", min_length=1, description="What the tables call the candidate.")
    reference_name: str = Field(default="base", min_length=1, description="What the tables call the reference.")

    @model_validator(mode="after")
    def _can_decide(self) -> Self:
        if 1 / (self.resamples + 1) > 1 - self.confidence:
            raise ValueError(
                f"resamples: {self.resamples} can show no confidence of {self.confidence:g};"
                f" draw at least {round(1 / (1 - self.confidence))}"
            )
        names = [(guard.metric, guard.examples) for guard in self.guards]
        if len(set(names)) < len(names):
            raise ValueError(f"guards: {', '.join(name for name, _ in names)} names one twice; guard each once")
        if self.candidate_name == self.reference_name:
            raise ValueError(f"candidate_name: {self.candidate_name!r} is reference_name too; give them two names")
        return self
