"""How an error comes back from another process, which tells its name and its message."""

import pytest

from longspan.errors import EngineError, StepTimeout, WeightError, error_named


@pytest.mark.parametrize("kind", [WeightError, StepTimeout, EngineError])
def test_an_error_of_the_model_or_the_engine_is_of_its_class_again(kind):
    error = error_named(kind.__name__, "what is wrong; remedy")
    assert type(error) is kind
    assert str(error) == "what is wrong; remedy"


@pytest.mark.parametrize("name", ["ConfigError", "LongspanError", "ValueError", "error_named", ""])
def test_of_any_other_name_none_is_made(name):
    assert error_named(name, "told") is None
