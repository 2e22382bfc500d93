"""The fields that OpenAI's generating endpoints share, and their conversion to sampling parameters.

It owns names, types and defaults; `SamplingParams` checks ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from longspan.errors import RequestError
from longspan.request import SamplingParams
from longspan.server.errors import shortened
from longspan.server.grammar import grammar_of
from longspan.server.served import ServedModel

_MAX_N = 128
_MAX_LOGPROBS = 20
_MAX_ALLOWED = 1 << 18  # tokens of the largest vocabularies
_MAX_DIGITS = 20  # of a token id; Python refuses to convert thousands of digits
_SAMPLING = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "seed", "stop", "stop_token_ids", "min_tokens", "allowed_token_ids", "bad_words", "ignore_eos",
    "include_stop_str_in_output", "skip_special_tokens", "cache_salt", "priority",
)  # fmt: skip


# vLLM's fields that change nothing here, and why
UNUSED_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "length_penalty": "there is no beam search",
        "spaces_between_special_tokens": "the tokenizer decides on them",
        "guided_decoding_backend": "there is one library for grammars",
        "guided_whitespace_pattern": "the whitespace of grammars is fixed",
        "mm_processor_kwargs": "models read text only",
        "include_reasoning": "reasoning is part of the content",
        "vllm_xargs": "there are no extensions that read it",
        "kv_transfer_params": "the router and its headers carry them",
    }
)


_Word = Annotated[str, Field(min_length=1, max_length=64)]
_Stop = Annotated[str, Field(max_length=1024)]  # every new text is searched for each of them
Ids = Annotated[list[int], Field(fail_fast=True)]  # stop at the first wrong id: a body may hold millions


class Body(BaseModel):
    """A JSON object with strict types. An unknown field is an error that names it."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    unused: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Names of further fields that are taken and change nothing, and why."""
    _num_bytes: int = PrivateAttr(0)

    @classmethod
    def of(cls, values: Any, num_bytes: int) -> Self:
        """Validate decoded JSON. `num_bytes` is the size of its text. Raises pydantic's `ValidationError`.

        An unknown field is refused before the values of others are looked at.
        """
        unknown = cls._unknown(values)
        if unknown is not None:
            error = InitErrorDetails(type="extra_forbidden", loc=(unknown,), input=values[unknown])
            raise ValidationError.from_exception_data(cls.__name__, [error])
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
        unknown = cls._unknown(value)
        known = {name: value[name] for name in cls._names() if name in value}
        return known if unknown is None else {**known, unknown: value[unknown]}

    @classmethod
    def _names(cls) -> list[str]:
        return [field.alias or name for name, field in cls.model_fields.items()]

    @classmethod
    def _unknown(cls, value: Any) -> str | None:
        """The first unknown field of an object; None if there is none."""
        known = set(cls._names())
        return next((name for name in value if name not in known), None) if isinstance(value, dict) else None


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

    unused: ClassVar[Mapping[str, str]] = UNUSED_FIELDS

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
    min_tokens: int | None = Field(
        default=None,
        description="not OpenAI's: tokens before which no end token, stop token or stop string ends the completion",
    )
    allowed_token_ids: Annotated[Ids, Field(max_length=_MAX_ALLOWED)] | None = Field(
        default=None, description="not OpenAI's: the only tokens that are sampled"
    )
    bad_words: Annotated[list[_Word], Field(fail_fast=True, max_length=256)] | None = Field(
        default=None, description="not OpenAI's: words that are not generated, with or without a space before them"
    )
    truncate_prompt_tokens: int | None = Field(
        default=None, description="not OpenAI's: keep this many tokens at the end of a prompt, and BOS before them;"
        " -1: as many as leave room for max_tokens"
    )  # fmt: skip
    ignore_eos: bool | None = Field(default=None, description="not OpenAI's")
    include_stop_str_in_output: bool | None = Field(default=None, description="not OpenAI's")
    response_format: ResponseFormat | None = None
    skip_special_tokens: bool | None = Field(default=None, description="not OpenAI's")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="not OpenAI's: cached prefixes are shared with requests of the same salt only"
    )
    priority: int | None = Field(
        default=None, description="not OpenAI's: lower is served first, default 0; needs --scheduling-policy priority"
    )
    request_id: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        default=None, description="not OpenAI's: the answer's id is this one, behind cmpl- or chatcmpl-"
    )
    prompt_logprobs: int | None = Field(
        default=None, description="not OpenAI's: score the prompt, with that many alternatives a token; not in streams"
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

    @property
    def prompt_field(self) -> str:
        """The field that has the prompt."""
        return "prompt"

    @property
    def limit_field(self) -> str | None:
        """The field by which the client limits the output; None if there is none."""
        return None

    @property
    def names(self) -> Mapping[str, str]:
        """What the client calls the fields that errors of the engine name."""
        limit = self.limit_field or self.prompt_field
        return {"prompt": self.prompt_field, "prompt_token_ids": self.prompt_field, "max_tokens": limit}

    def tokens_kept(self, max_model_len: int, max_tokens: int | None) -> int | None:
        """How many tokens of a prompt are kept; None for all. Raises `RequestError`."""
        wanted = self.truncate_prompt_tokens
        if wanted is None or wanted > 0:
            return wanted
        if wanted != -1:
            remedy = "give a positive number, or -1 for as many as there is room for"
            raise RequestError("truncate_prompt_tokens", wanted, "keeps nothing", remedy)
        return max(1, max_model_len - (max_tokens or 1))

    def sampling(
        self, served: ServedModel, max_tokens: int | None, logprobs: int | None, grammar: str | None = None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:  # fmt: skip
        """The fields as sampling parameters. `prompt_logprobs` is what `echo` needs. Raises `RequestError`."""
        given = {name: getattr(self, name) for name in _SAMPLING if getattr(self, name) is not None}
        if self.n is not None and self.n > _MAX_N:
            raise RequestError("n", self.n, f"must be at most {_MAX_N}", "send several requests")
        if self.prompt_logprobs is not None and self.stream:
            remedy = "set stream to false, or leave it out"
            raise RequestError("prompt_logprobs", self.prompt_logprobs, "is not part of streams", remedy)
        for name, count in (("logprobs", logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and count > _MAX_LOGPROBS:
                raise RequestError(name, count, f"must be at most {_MAX_LOGPROBS}", "ask for fewer")
        scores = [count for count in (prompt_logprobs, self.prompt_logprobs) if count is not None]
        if grammar is None and self.response_format is not None:
            grammar = self.response_format.grammar()
        return SamplingParams(
            **{**served.defaults, **given}, max_tokens=max_tokens, logprobs=logprobs, logit_bias=self._bias(),
            grammar=grammar, prompt_logprobs=max(scores, default=None),
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
