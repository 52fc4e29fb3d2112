"""The `registry` section of a recipe, promotion and its mirror, and what their steps are given."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from modelmill.components.core.errors import UserError
from modelmill.components.core.recipe import Section
from modelmill.components.core.uri import split_s3

# Tags that the registry's steps write themselves: a recipe must not contradict them.
WRITTEN_TAGS = (
    "weights_digest",
    "files_digest",
    "dataset_digest",
    "tokenizer_digest",
    "base",
    "base_digest",
    "adapter_digest",
    "method",
    "flavor",
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
    "gate",
    "gate_digest",
    "gate_metric",
    "gate_gain",
    "promotion",
    "promotion_reason",
    "promotion_gate",
    "promotion_by",
    "promotion_at",
    "promotion_run",
    "promotion_note",
    "promotion_replaced",
    "rolled_back",
    "rolled_back_by",
    "rolled_back_at",
    "rolled_back_to",
    "sagemaker_package",
)


class FetchModelConfig(Section):
    """Which model a pipeline starts from."""

    reference: str = Field(
        min_length=1,
        description="A local folder, s3://<bucket>/<prefix>, models:/<name>@<alias> or models:/<name>/<version> of the"
        " registry, hf:<id> with an optional @<revision>, or package:<import name>/<folder> for one that an installed"
        " package ships.",
    )
    otherwise: str | None = Field(
        default=None,
        min_length=1,
        description="Taken in its place while the registry has no such version, as before the first champion.",
    )
    made_by: str = Field(
        default="", description="Recipe whose run registers the model; an error names it where the model is missing."
    )

    def champion_of(self, name: str) -> FetchModelConfig:
        """The champion of a registered model; before the first one this model, or what stands in for it."""
        return FetchModelConfig(reference=f"models:/{name}@champion", otherwise=self.otherwise or self.reference)

    def fingerprint(self) -> str:
        """What the reference stands for now.

        Raises:
            UserError: it stands for nothing.
        """
        from modelmill.components.registry.model_source import NoSuchVersion, model_state

        try:
            return model_state(self.reference, "model.reference")
        except NoSuchVersion as missing:
            if self.otherwise is None:
                raise self.explained(missing) from None
        try:
            return f"otherwise {model_state(self.otherwise, 'model.otherwise')}"
        except NoSuchVersion as missing:
            raise self.explained(missing) from None

    def explained(self, missing: UserError) -> UserError:
        """The error of a missing version, with the command that makes one where the recipe knows it."""
        return UserError(f"{missing}; `modelmill run {self.made_by}` makes it") if self.made_by else missing


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
        if value in ("champion", "challenger", "previous"):
            raise ValueError("only a promotion sets it; register under another alias, such as candidate")
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


class PromoteConfig(Section):
    """How a passed gate becomes the champion."""

    note: str = Field(
        default="", max_length=1000, description="Why this recipe promotes; kept with the version and in the report."
    )


class SageMakerConfig(Section):
    """A model package group of the SageMaker Model Registry that follows the promotions."""

    group: str = Field(
        pattern=r"^[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}$", description="Model package group; made when there is none."
    )
    region: str | None = Field(
        default=None,
        pattern=r"^[a-z]{2}(-[a-z]+)+-\d$",
        description="AWS region; else the one of the environment or profile.",
    )
    model_data: str = Field(description="Folder for the packed models, as s3://bucket/prefix.")
    image: str = Field(
        min_length=1, max_length=255, pattern=r"^\S+$", description="Container image that serves the model."
    )
    content_types: tuple[str, ...] = Field(
        default=("application/json",), min_length=1, description="What the container reads."
    )
    response_types: tuple[str, ...] = Field(
        default=("application/json",), min_length=1, description="What the container answers with."
    )
    instance_types: tuple[str, ...] = Field(
        default=(), description="Instance types the model may be served on; none leaves it open."
    )
    environment: dict[str, str] = Field(default={}, max_length=100, description="Environment of the container.")

    @field_validator("model_data")
    @classmethod
    def _an_s3_folder(cls, value: str) -> str:
        try:
            split_s3(value, parameter="model_data")
        except UserError as error:
            raise ValueError(str(error)) from None
        return value.rstrip("/")


class MirrorConfig(Section):
    """Whether promotions are mirrored."""

    sagemaker: SageMakerConfig | None = Field(
        default=None, description="The group that follows; null leaves SageMaker alone."
    )
