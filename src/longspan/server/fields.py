"""The fields that OpenAI's generating endpoints share, and their conversion to sampling parameters.

It owns names, types and defaults; `SamplingParams` checks ranges.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from longspan.errors import RequestError
from longspan.request import SamplingParams
from longspan.server.errors import shortened
from longspan.server.grammar import grammar_of

_MAX_N = 128
_MAX_LOGPROBS = 20
_MAX_DIGITS = 20  # of a token id; Python refuses to convert thousands of digits
_SAMPLING = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output",
    "skip_special_tokens", "cache_salt",
)  # fmt: skip


_Stop = Annotated[str, Field(max_length=1024)]  # every new text is searched for each of them
Ids = Annotated[list[int], Field(fail_fast=True)]  # stop at the first wrong id: a body may hold millions


class Body(BaseModel):
    """A JSON object with strict types. An unknown field is an error that names it."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    _num_bytes: int = PrivateAttr(0)

    @classmethod
    def of(cls, values: Any, num_bytes: int) -> Self:
        """Validate decoded JSON. `num_bytes` is the size of its text. Raises pydantic's `ValidationError`."""
        body = cls.model_validate(values)
        body._num_bytes = num_bytes
        return body

    @property
    def num_bytes(self) -> int:
        """Size of the JSON text that it was parsed from, 0 without one."""
        return self._num_bytes

    @model_validator(mode="before")
    @classmethod
    def _first_unknown_field_only(cls, value: Any) -> Any:
        """Keep one unknown field at most: pydantic makes an error for each, which takes long for a million of them."""
        if not isinstance(value, dict):
            return value
        names = [field.alias or name for name, field in cls.model_fields.items()]
        known = {name: value[name] for name in names if name in value}
        unknown = next((name for name in value if name not in known), None)
        return known if unknown is None else {**known, unknown: value[unknown]}


class StreamOptions(Body):
    """What a stream sends besides text."""

    include_usage: bool = False
    include_obfuscation: bool | None = Field(default=None, description="taken, not used")
    continuous_usage_stats: bool = False


class JsonSchema(Body):
    """OpenAI's wrapper of a schema."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> str | None:
        """The grammar that enforces the format; None for plain text. Raises `RequestError`."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return grammar_of({"type": "object"})
        if self.json_schema is None:
            raise RequestError("response_format.json_schema", None, "is missing", "give {'name': ..., 'schema': {...}}")
        return grammar_of(self.json_schema.schema_)


class GenerationBody(Body):
    """The fields that completions and chats share. None is the same as leaving a field out."""

    model: str | None = Field(default=None, description="the served model; default: the only one there is")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, description="completions of each prompt; default 1")
    temperature: float | None = Field(default=None, description="0 is greedy; default 1")
    top_p: float | None = None
    top_k: int | None = Field(default=None, description="not OpenAI's: -1 and 0 mean all tokens")
    min_p: float | None = Field(default=None, description="not OpenAI's")
    repetition_penalty: float | None = Field(default=None, description="not OpenAI's")
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = Field(
        default=None, description="token id: added to its logit"
    )
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(fail_fast=True, max_length=64)] | None = None
    stop_token_ids: Annotated[Ids, Field(max_length=256)] | None = Field(default=None, description="not OpenAI's")
    ignore_eos: bool | None = Field(default=None, description="not OpenAI's")
    include_stop_str_in_output: bool | None = Field(default=None, description="not OpenAI's")
    response_format: ResponseFormat | None = None
    skip_special_tokens: bool | None = Field(default=None, description="not OpenAI's")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="not OpenAI's: cached prefixes are shared with requests of the same salt only"
    )
    user: str | None = Field(default=None, description="taken, not used")
    safety_identifier: str | None = Field(default=None, description="taken, not used")
    prompt_cache_key: str | None = Field(default=None, description="taken, not used")
    service_tier: str | None = Field(default=None, description="taken, not used")

    @property
    def usage_in_stream(self) -> StreamOptions:
        """The stream's options, or the defaults. Raises `RequestError` if options are given without `stream`."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", "{...}", "is for streams only", "set stream to true, or leave it out")
        return self.stream_options or StreamOptions()

    def sampling(
        self,
        max_tokens: int | None,
        logprobs: int | None,
        grammar: str | None = None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """The fields as sampling parameters. Raises `RequestError`."""
        given = {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}
        if self.n is not None and self.n > _MAX_N:
            raise RequestError("n", self.n, f"must be at most {_MAX_N}", "send several requests")
        if logprobs is not None and logprobs > _MAX_LOGPROBS:
            raise RequestError("logprobs", logprobs, f"must be at most {_MAX_LOGPROBS}", "ask for fewer")
        if grammar is None and self.response_format is not None:
            grammar = self.response_format.grammar()
        return SamplingParams(
            **given, max_tokens=max_tokens, logprobs=logprobs, logit_bias=self._bias(), grammar=grammar,
            prompt_logprobs=prompt_logprobs,
        )  # fmt: skip

    def _bias(self) -> tuple[tuple[int, float], ...]:
        pairs: list[tuple[int, float]] = []
        for token, bias in (self.logit_bias or {}).items():
            if not token.isascii() or not token.isdigit() or len(token) > _MAX_DIGITS:
                raise RequestError("logit_bias", shortened(token), "is no token id", "give ids as decimal strings")
            if not -100 <= bias <= 100:
                raise RequestError(f"logit_bias.{token}", bias, "must be in [-100, 100]", "change it")
            pairs.append((int(token), bias))
        return tuple(pairs)
