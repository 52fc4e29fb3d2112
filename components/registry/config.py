"""The `registry` section of a recipe, and what the registration step is given."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from modelmill.components.core.recipe import Section

# Tags the registration writes itself: a recipe must not contradict them.
WRITTEN_TAGS = (
    "weights_digest",
    "dataset_digest",
    "tokenizer_digest",
    "recipe",
    "recipe_hash",
    "code_version",
    "code_digest",
    "run_id",
    "test_loss",
    "perplexity",
    "bits_per_byte",
    "bigram_bits_per_byte",
    "unigram_bits_per_byte",
)


class FetchModelConfig(Section):
    """Which model a pipeline starts from."""

    reference: str = Field(
        min_length=1,
        description="A local folder, models:/<name>@<alias> or models:/<name>/<version> of the registry, hf:<id> with"
        " an optional @<revision>, or package:<import name>/<folder> for one that an installed package ships.",
    )
    otherwise: str | None = Field(
        default=None,
        min_length=1,
        description="Taken in its place while the registry has no such version, as before the first champion.",
    )

    def fingerprint(self) -> str:
        """What the reference stands for now.

        Raises:
            UserError: it stands for nothing.
        """
        from modelmill.components.registry.model_source import NoSuchVersion, model_state

        try:
            return model_state(self.reference, "model.reference")
        except NoSuchVersion:
            if self.otherwise is None:
                raise
        return f"otherwise {model_state(self.otherwise, 'model.otherwise')}"


class RegistryConfig(Section):
    """Under which name a model enters the MLflow registry."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$", description="Registered model the new version belongs to."
    )
    alias: str = Field(default="candidate", description="Alias that points to the version afterwards.")
    description: str = Field(default="", description="What the model is meant for; stands in the model card.")
    tags: dict[str, str] = Field(default={}, description="More tags for the version.")

    @field_validator("alias")
    @classmethod
    def _usable_alias(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,99}", value):
            raise ValueError("an alias starts with a letter and holds letters, digits, - and _")
        if value.lower() == "latest" or re.fullmatch(r"[vV]\d+", value):
            raise ValueError("MLflow keeps `latest` and `v1`, `v2`, ... for itself; choose another word")
        return value

    @field_validator("tags")
    @classmethod
    def _own_tags(cls, value: dict[str, str]) -> dict[str, str]:
        taken = sorted(set(value) & set(WRITTEN_TAGS))
        if taken:
            raise ValueError(f"{', '.join(taken)} is written by the registration itself; choose another name")
        return value


class RegisterConfig(RegistryConfig):
    """What the registration step is given: the recipe's section and which recipe it was."""

    recipe_name: str = Field(default="", description="Name of the recipe that made the model.")
    recipe_hash: str = Field(default="", description="Hash of that recipe.")
