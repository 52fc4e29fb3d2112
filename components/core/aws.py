"""Sessions and clients of AWS, and its troubles in one line. boto3 is imported where AWS is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from modelmill.components.core.errors import UserError
from modelmill.components.core.mlflow_store import one_line

if TYPE_CHECKING:
    from boto3.session import Session

_FAMILIES = ("botocore", "boto3", "s3transfer", "sagemaker", "pydantic", "pydantic_core")
_ABSENT = ("ResourceNotFound", "ResourceNotFoundException", "404", "NoSuchKey", "NotFound")
_ATTEMPTS = 8  # of a request that is throttled, fails inside AWS or loses its connection


def open_session(region: str | None, parameter: str) -> Session:
    """A session with the credentials of the environment, profile or role; checked before anything is sent.

    Args:
        region: null takes that of the environment or profile.
        parameter: section of the recipe or profile, for messages.

    Raises:
        UserError: boto3 is not installed, or there is no region or no credentials.
    """
    try:
        import boto3
    except ModuleNotFoundError as error:
        raise UserError(f"{parameter}: {error.name} is not installed; pip install 'modelmill[aws]'") from None
    session = boto3.Session(region_name=region)
    if session.region_name is None:
        raise UserError(f"{parameter}.region: none is given and the environment names none; set it or AWS_REGION")
    if session.get_credentials() is None:
        raise UserError(
            f"{parameter}: there are no AWS credentials; set AWS_PROFILE, or give the pod's account a role"
        )
    return session


def client(session: Session, service: str) -> Any:
    """A client that tries again where AWS throttles it, fails, or the connection breaks."""
    from botocore.config import Config

    retries: Any = {"mode": "standard", "max_attempts": _ATTEMPTS}
    return session.client(service, config=Config(connect_timeout=10, read_timeout=60, retries=retries))


@contextmanager
def aws_trouble(parameter: str) -> Iterator[None]:
    """What AWS, its SDK or the network says, as one line.

    Raises:
        UserError: anything of that went wrong inside.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _FAMILIES:
            raise
        raise UserError(f"{parameter}: {one_line(error)}; check region, permissions and the section") from None


def error_code(error: Exception) -> str:
    """Code of what AWS answered, empty where it is no answer of AWS."""
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))


def is_missing(error: Exception) -> bool:
    """Whether AWS says that what was asked for does not exist; SageMaker says so in the words of a wrong request."""
    code = error_code(error)
    message = str(getattr(error, "response", {}).get("Error", {}).get("Message", ""))
    words = ("not exist", "not found", "Could not find")
    return code in _ABSENT or (code == "ValidationException" and any(word in message for word in words))
