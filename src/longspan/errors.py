"""The exception tree: all errors that users can see, with messages that name field, value and remedy.

It owns the types, and how another process builds an error from its name; it must not know what raises them.

    LongspanError
    ├── ConfigError        an option or a combination of options is impossible
    ├── ModelError         the model's files cannot be used
    │   ├── ModelNotFound      no such folder, file or hub id
    │   ├── UnsupportedModel   an architecture, rope type or quantisation this version lacks
    │   └── WeightError        a tensor is missing, extra, misshapen or its file is damaged
    ├── RequestError       one request cannot be served; others are not affected
    │   ├── ContextOverflow    prompt + max_tokens exceed what the engine can hold
    │   ├── QueueFull          too many requests are waiting
    │   └── RequestTimeout     the request took longer than the server allows
    └── EngineError        the engine itself failed
        ├── WorkerDied         a rank's process or thread ended, or does not answer
        ├── StepTimeout        a step took longer than its limit
        └── EngineUnavailable  the engine cannot serve now
"""


class LongspanError(Exception):
    """Root of the tree. `str(error)` is a message that says what to do."""


class ConfigError(LongspanError, ValueError):
    """An option, or a combination of options, is impossible.

    The message has the form `field=value: what is wrong; remedy`.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        named = field if value == "" else f"{field}={value}"
        super().__init__(f"{named}: {problem}; {remedy}")


class ModelError(LongspanError):
    """The model's files cannot be used."""


class ModelNotFound(ModelError):
    """No such folder, file or hub id."""


class UnsupportedModel(ModelError):
    """An architecture, rope type or quantisation that this version does not support."""


class WeightError(ModelError):
    """A tensor is missing, extra or misshapen, or the file that holds it is damaged."""


class RequestError(LongspanError, ValueError):
    """One request cannot be served; others are not affected.

    The message has the form `field=value: what is wrong; remedy`.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        named = field if isinstance(value, str) and not value else f"{field}={value}"
        super().__init__(f"{named}: {problem}; {remedy}")


class ContextOverflow(RequestError):
    """Prompt and max_tokens together exceed what the engine can ever hold."""


class QueueFull(RequestError):
    """Too many requests are waiting: try again later."""


class RequestTimeout(RequestError):
    """The request took longer than the server allows."""


class EngineError(LongspanError):
    """The engine itself failed; requests in flight are lost."""


class WorkerDied(EngineError):
    """A rank's process or thread ended, or no longer answers, while the engine needed it."""


class StepTimeout(EngineError):
    """A step took longer than its limit: a rank hangs, or the limit is too low."""


class EngineUnavailable(EngineError):
    """The engine cannot serve now: it is shutting down, or it has failed repeatedly."""


def error_named(name: str, message: str) -> LongspanError | None:
    """The error with this class name and message; None unless it is a `ModelError` or an `EngineError`.

    Only these two can be built from a message alone.
    """
    kind = globals().get(name)
    return kind(message) if isinstance(kind, type) and issubclass(kind, ModelError | EngineError) else None
