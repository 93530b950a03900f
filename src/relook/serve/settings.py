"""Settings of a server, checked once when it starts."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from relook.serve.fetch import FetchSettings
from relook.serve.limits import Limits
from relook.serve.security import SecuritySettings


class ServeSettings(BaseModel):
    """What a server offers, to whom, and how much of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str | None = None
    """What the model is called in the API; None: the name of the model."""
    max_tokens: int = Field(default=256, ge=1)
    """Tokens of an answer (and of each turn before it) where a request does not say."""
    crops_in_text: bool = False
    """Put the crop of every region look into the answer's text, as a Markdown image: for chat front ends that show
    text only. It is taken out again where such a text comes back as history."""
    limits: Limits = Field(default_factory=lambda: Limits.model_validate({}))
    fetch: FetchSettings = Field(default_factory=lambda: FetchSettings.model_validate({}))
    security: SecuritySettings = SecuritySettings()
