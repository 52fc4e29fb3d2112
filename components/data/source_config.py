"""Where data comes from: what sections with sources have in common, whichever domain they belong to.

A domain's source is one of these places together with what its records hold. Importing this costs nothing; what looks
at a place is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from modelmill.components.core.recipe import Section
from modelmill.components.core.uri import S3Endpoint
from modelmill.components.data.files import TEXT_FORMATS, Formats


class DataSource(Section):
    """What every source has.

    Attributes:
        parameter: how the recipe calls it, for messages.
        formats: of files and objects that are read.
    """

    parameter: ClassVar[str]
    formats: ClassVar[Formats] = TEXT_FORMATS


class LocalFiles(DataSource):
    """Files and folders of this machine."""

    type: Literal["files"]
    paths: list[str] = Field(min_length=1, description="Files or folders, relative to the working directory.")

    @property
    def label(self) -> str:
        """Where the data comes from, for people."""
        return ", ".join(self.paths)

    def fingerprint(self) -> str:
        from modelmill.components.data.files import fingerprint_files

        return fingerprint_files(self.paths, parameter=f"{self.parameter}.paths", formats=self.formats)


class S3Objects(DataSource):
    """Objects of S3."""

    type: Literal["s3"]
    uri: str = Field(description="s3://bucket/prefix or s3://bucket/key.")
    endpoint_url: S3Endpoint = None

    @property
    def label(self) -> str:
        return self.uri

    def fingerprint(self) -> str:
        from modelmill.components.data.s3 import fingerprint_objects

        return fingerprint_objects(self)


class SourcesConfig(Section):
    """A section with one source or several; one may stand without its list."""

    source: Sequence[Any]

    @field_validator("source", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return value if isinstance(value, (list, tuple)) else [value]

    def fingerprint(self) -> str:
        """State of what the sources read: versions, or names, sizes and times.

        Raises:
            UserError: a source cannot be found or listed.
        """
        return ";".join(f"{source.type}:{source.fingerprint()}" for source in self.source)


def check_held_out(validation_fraction: float, test_fraction: float) -> None:
    """Have something left to train on.

    Raises:
        ValueError: the two shares are everything.
    """
    if validation_fraction + test_fraction >= 1:
        held_out = f"{validation_fraction} + {test_fraction}"
        raise ValueError(f"validation_fraction + test_fraction: {held_out} leaves nothing to train on; lower them")
