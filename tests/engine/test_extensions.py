"""What a caller adds to an engine: a schedule or a backend in a file of its own, given as an object."""

from dataclasses import replace

import pytest

from longspan.attention.schedules import SCHEDULES
from longspan.errors import ConfigError
from tests.engine.gather_all import SCHEDULE
from tests.engine.one_by_one import BACKEND, OneByOne
from tests.engine.test_bytes_that_travel import decode_step
from tests.engine.test_every_layout_gives_the_same_tokens import expected, prompts, tokens_of
from tests.pairs import in_turn

MODELS = ["llama", "deepseek-v3", "gpt-oss"]
LAYOUTS = [{"pcp": 2}, {"tp": 2, "dcp": 2}, {"tp": 2, "pcp": 3, "dcp": 2}]


def moved(llm) -> set[str]:
    """The schedules under which bytes travelled, the added ones too."""
    sent = llm.stats().traffic.bytes_by_label
    return {name for name in llm.engine.setup.schedules if sent.get(name)}


def backends_of(llm) -> list[OneByOne]:
    """The attention backend of every rank."""
    return [runner.attention.ops.backend for runner in llm.engine.executor.runners]


@pytest.mark.parametrize(("model", "layout"), in_turn(MODELS, LAYOUTS), ids=str)
def test_an_added_schedule_gives_the_oracles_tokens(tiny, model, layout):
    llm = tiny(model, **layout, schedules=[SCHEDULE], schedule="gather_all")
    assert tokens_of(llm, prompts()) == expected(model)
    assert moved(llm) == {"gather_all"}


def test_an_added_schedule_is_chosen_where_its_formula_says_that_it_is_the_fastest(tiny):
    llm = tiny(pcp=2, schedules=[SCHEDULE])
    assert tokens_of(llm, prompts()) == expected("llama")
    assert moved(llm) == {"gather_all"}


def test_an_added_schedule_sends_the_bytes_of_its_formula(tiny):
    llm = tiny(tp=2, pcp=2, dcp=2, schedules=[SCHEDULE], schedule="gather_all")
    counted, by_formula = decode_step(llm, "gather_all")
    assert counted == by_formula


def test_an_added_schedule_is_timed_at_the_start_like_the_built_in_ones(tiny):
    llm = tiny(pcp=2, cost=None, schedules=[SCHEDULE])
    assert set(llm.engine.core.constants.fixed) == {*SCHEDULES, "gather_all"} - {"local"}


def test_what_an_added_schedule_moves_is_asked_of_its_record(tiny):
    carrying = replace(SCHEDULES["gather_kv"], name="carry_kv")
    llm = tiny(pcp=2, schedules=[carrying], schedule="carry_kv")
    assert tokens_of(llm, prompts()) == expected("llama")
    assert moved(llm) == {"gather_kv"}  # under which that file's collectives are counted


def test_ranks_in_other_processes_are_given_no_objects(tiny):
    with pytest.raises(ConfigError, match=r"schedules=.*gather_all.*other processes.*; use executor='threads'"):
        tiny(pcp=2, executor="processes", schedules=[SCHEDULE])


@pytest.mark.parametrize("name", ["auto", "local", "ring_kv"])
def test_a_built_in_name_is_not_given_again(tiny, name):
    with pytest.raises(ConfigError, match=rf"schedules={name}: is the name of a built-in choice; give it another name"):
        tiny(schedules=[replace(SCHEDULE, name=name)])


def test_two_added_schedules_have_two_names(tiny):
    with pytest.raises(ConfigError, match="two have one name; give each its own"):
        tiny(schedules=[SCHEDULE, SCHEDULE])


def test_a_forced_schedule_is_one_of_the_engines_own(tiny):
    with pytest.raises(ConfigError, match=r"schedule=gather_all: unknown choice; use one of auto, local, gather_q"):
        tiny(pcp=2, schedule="gather_all")


@pytest.mark.parametrize(("model", "layout"), in_turn(MODELS, [{}, {"pcp": 2}, {"tp": 2, "dcp": 2}]), ids=str)
def test_an_added_backend_gives_the_oracles_tokens(tiny, model, layout):
    llm = tiny(model, **layout, backends=[BACKEND], attention_backend="one_by_one")
    assert tokens_of(llm, prompts()) == expected(model)
    assert all(isinstance(backend, OneByOne) and backend.prepared for backend in backends_of(llm))


@pytest.mark.parametrize("layout, schedule", [({}, "auto"), ({"pcp": 2}, "gather_q"), ({"pcp": 2}, "gather_kv")])
def test_what_is_prepared_serves_all_layers_of_a_step(tiny, layout, schedule):
    llm = tiny(**layout, schedule=schedule, local_context=0, backends=[BACKEND], attention_backend="one_by_one")
    tokens_of(llm, prompts())
    used = {prepared.used for backend in backends_of(llm) for prepared in backend.prepared}
    assert used - {0} == {llm.engine.setup.model.num_layers}  # all in one step: what a step leaves unused stays unused


def test_auto_may_choose_an_added_backend_before_the_built_in_ones(tiny):
    llm = tiny(backends=[replace(BACKEND, automatic=True)])
    assert llm.engine.setup.backend.name == "one_by_one"


def test_an_added_backend_says_what_it_cannot_serve(tiny):
    with pytest.raises(ConfigError, match="attention_backend=one_by_one: reads no quantised cache"):
        tiny(backends=[BACKEND], attention_backend="one_by_one", kv_cache_dtype="int8")


def test_a_built_in_backend_keeps_its_name(tiny):
    with pytest.raises(ConfigError, match="backends=cpu: is the name of a built-in choice"):
        tiny(backends=[replace(BACKEND, name="cpu")])
