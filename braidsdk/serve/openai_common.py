"""What the bodies of OpenAI's APIs have in common."""

from typing import Annotated, Literal

from pydantic import Field

from braidsdk.serve.answering import BraidOptions
from braidsdk.serve.messages import Strict


class TextFormat(Strict):
    """The form of an answer."""

    type: Literal["text"]


class OpenAIRequest(Strict):
    """The common fields. Those that say something about the caller (user, safety_identifier, prompt_cache_key,
    metadata) are taken, and change no answer."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = False
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    braid: BraidOptions = BraidOptions()
