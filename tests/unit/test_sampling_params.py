"""SamplingParams: every field has a bound, every bound is enforced, and errors name the field."""

from __future__ import annotations

import dataclasses
import math
import typing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from setpoint.engine.sampling import BOUNDS, MAX_VOCABULARY, Bound, SamplingParams
from setpoint.errors import ContextLengthError, RequestError

FIELDS = {field.name: field for field in dataclasses.fields(SamplingParams)}
SCALARS = {name: bound for name, bound in BOUNDS.items() if bound.max_items is None}
LISTS = {name: bound for name, bound in BOUNDS.items() if bound.max_items is not None and name != "logit_bias"}
FLAGS = ["ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"]


def refused(param: str, reason: str = "out_of_range", **fields) -> str:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**fields)
    assert caught.value.param == param
    assert caught.value.reason == reason
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 200
    return message


def built(fields: dict) -> tuple[SamplingParams | None, RequestError | None]:
    try:
        return SamplingParams(**fields), None
    except RequestError as error:
        return None, error


def items_of(bound: Bound, count: int) -> list:
    item = "a" if bound.kind == "str" else 0
    return [[item] if bound.max_inner_items else item] * count


def test_every_field_has_a_bound_or_is_a_flag():
    hints = typing.get_type_hints(SamplingParams)
    assert {name for name, hint in hints.items() if hint is bool} == set(FLAGS)
    assert set(FIELDS) - set(FLAGS) - {"structured_outputs"} == set(BOUNDS)  # which states the bounds of its own fields
    for name, bound in BOUNDS.items():
        assert bound.minimum < bound.maximum, name
        assert math.isfinite(bound.maximum), name
        is_list = typing.get_origin(hints[name]) is not None and "Sequence" in str(hints[name])
        assert (bound.max_items is not None) == (is_list or name == "logit_bias"), name


def test_the_bounds_are_those_of_the_interface():
    numbers = {name: (bound.minimum, bound.maximum) for name, bound in SCALARS.items()}
    assert numbers["n"] == (1, 64)
    assert numbers["temperature"] == (0, 2)
    assert numbers["presence_penalty"] == numbers["frequency_penalty"] == (-2, 2)
    assert numbers["repetition_penalty"] == (0, 10)
    assert numbers["top_p"] == numbers["min_p"] == (0, 1)
    assert numbers["seed"] == (-(2**63), 2**63 - 1)
    assert numbers["logprobs"] == numbers["prompt_logprobs"] == (0, 20)
    assert {name for name, bound in BOUNDS.items() if bound.exclusive_minimum} == {"repetition_penalty", "top_p"}
    items = {name: bound.max_items for name, bound in BOUNDS.items()}
    assert (items["stop"], items["stop_token_ids"], items["bad_words"], items["logit_bias"]) == (16, 64, 128, 1024)
    assert BOUNDS["stop"].maximum == BOUNDS["bad_words"].maximum == 256


def test_defaults():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (16, 0, None, None)
    assert params.repetition_penalty == 1.0
    assert params.stop == params.stop_token_ids == params.bad_words == ()
    assert params.logit_bias is params.allowed_token_ids is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("name", SCALARS)
def test_scalars_at_and_beyond_their_limits(name):
    bound = SCALARS[name]
    step = 1 if bound.kind == "int" else 1e-6
    room = {"max_tokens": None} if name == "min_tokens" else {}
    assert getattr(SamplingParams(**{name: bound.maximum}, **room), name) == bound.maximum
    refused(name, **{name: bound.maximum + step})
    refused(name, **{name: bound.minimum - step})
    if bound.exclusive_minimum:
        refused(name, **{name: bound.minimum})
    elif name != "top_k":  # -1 is read as 0
        assert getattr(SamplingParams(**{name: bound.minimum}), name) == bound.minimum


NO_NUMBERS = [True, math.nan, math.inf, -math.inf, "1", [1], {}, 1j, np.True_, np.ones(2), 1 << 20_000]


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: type(value).__name__)
def test_scalars_refuse_what_is_no_finite_number(name, value):
    refused(name, **{name: value})


@pytest.mark.parametrize("name", SCALARS)
def test_whole_numbers_stay_whole_and_only_optional_fields_take_none(name):
    if SCALARS[name].kind == "int":
        refused(name, **{name: 1.0})
    else:
        value = getattr(SamplingParams(**{name: 1}), name)
        assert isinstance(value, float)
        assert value == 1.0
    if "None" in str(typing.get_type_hints(SamplingParams)[name]):
        assert getattr(SamplingParams(**{name: None}), name) is None
    else:
        refused(name, **{name: None})


def test_numpy_scalars_become_plain_numbers():
    params = SamplingParams(temperature=np.float32(0.5), n=np.int64(2), stop_token_ids=np.arange(3))
    assert (params.temperature, params.n, params.stop_token_ids) == (0.5, 2, (0, 1, 2))
    assert {type(params.temperature), type(params.n), type(params.stop_token_ids[0])} == {float, int}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", [1, 0, None, "true"])
def test_flags_are_booleans(name, value):
    refused(name, **{name: value})


@pytest.mark.parametrize("name", LISTS)
def test_lists_are_bounded_in_length_and_items(name):
    bound = LISTS[name]
    most = min(bound.max_items, 1000)
    assert len(getattr(SamplingParams(**{name: items_of(bound, most)}), name)) == most
    if bound.max_items < MAX_VOCABULARY:
        refused(name, **{name: items_of(bound, bound.max_items + 1)})
    for wrong in (5, {"a": 1}, b"ab", [None], [True], iter(()), *([[1]] if bound.kind == "str" else [["a"], "ab"])):
        refused(name, **{name: wrong})
    if bound.kind == "str":
        refused(name, **{name: [""]})
        refused(name, **{name: ["a" * 257]})
    elif bound.max_inner_items:
        refused(name, **{name: [[]]})
        refused(name, **{name: [[0] * (bound.max_inner_items + 1)]})
        refused(name, **{name: [[-1]]})
    else:
        refused(name, **{name: [-1]})
        refused(name, **{name: [MAX_VOCABULARY]})
        refused(name, **{name: [1.0]})


def test_lists_are_kept_as_tuples():
    assert SamplingParams(stop="\n").stop == ("\n",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[2, 3]).stop == ("a", "b")
    assert SamplingParams(stop=None, bad_words=None, stop_token_ids=None).stop == ()
    assert SamplingParams(bad_words_token_ids=[[1, 2], [3]]).bad_words_token_ids == ((1, 2), (3,))
    ids = [1, 2]
    params = SamplingParams(allowed_token_ids=ids)
    ids.append(3)
    assert params.allowed_token_ids == (1, 2)


def test_an_empty_constraint_is_refused():
    refused("allowed_token_ids", allowed_token_ids=[])


def test_logit_bias():
    bias = {5: 1, 7: -100.0}
    params = SamplingParams(logit_bias=bias)
    bias[9] = 1
    assert params.logit_bias == {5: 1.0, 7: -100.0}
    assert SamplingParams(logit_bias={}).logit_bias == {}
    for wrong in (
        {5: 100.5}, {5: math.nan}, {5: True}, {5: "1"}, {"5": 1.0}, {-1: 0.0}, {True: 0.0}, {1.0: 0.0},
        {MAX_VOCABULARY: 0.0}, [(1, 2)], 3, dict.fromkeys(range(1025), 0.0),
    ):  # fmt: skip
        refused("logit_bias", logit_bias=wrong)


def test_fields_that_contradict_each_other():
    refused("n", "conflict", n=2, temperature=0)
    SamplingParams(n=1, temperature=0)
    refused("stop", "conflict", stop="x", detokenize=False)
    refused("min_tokens", max_tokens=4, min_tokens=5)
    SamplingParams(max_tokens=4, min_tokens=4)
    refused("allowed_token_ids", "conflict", allowed_token_ids=[1, 2], bad_words_token_ids=[[1], [2]])
    refused("allowed_token_ids", "conflict", allowed_token_ids=[1], stop_token_ids=[1], min_tokens=1)
    SamplingParams(allowed_token_ids=[1], stop_token_ids=[1])
    SamplingParams(allowed_token_ids=[1, 2], bad_words_token_ids=[[1], [2, 2]])


def test_top_k_of_minus_one_is_off():
    assert SamplingParams(top_k=-1).top_k == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop_token_ids": [99, 100]}, "stop_token_ids"),
        ({"allowed_token_ids": [100]}, "allowed_token_ids"),
        ({"logit_bias": {100: 1.0}}, "logit_bias"),
        ({"bad_words_token_ids": [[1], [5, 100]]}, "bad_words"),
        ({"top_k": 101}, "top_k"),
    ],
)
def test_ids_are_checked_against_the_width_of_the_logits(fields, param):
    params = SamplingParams(**fields)
    params.check_vocabulary(101)
    with pytest.raises(RequestError) as caught:
        params.check_vocabulary(100)
    assert caught.value.param == param
    SamplingParams().check_vocabulary(1)


def test_max_tokens_is_resolved_against_the_context():
    params = SamplingParams(max_tokens=None, temperature=0.5)
    assert params.resolve(100, 60) == dataclasses.replace(params, max_tokens=40)
    given_number = SamplingParams(max_tokens=40)
    assert given_number.resolve(100, 60) is given_number
    for params, num_prompt, param in (
        (SamplingParams(max_tokens=41), 60, "max_tokens"),
        (SamplingParams(max_tokens=None), 100, "messages"),
        (SamplingParams(max_tokens=1), 10**9, "messages"),
    ):
        with pytest.raises(ContextLengthError) as caught:
            params.resolve(100, num_prompt)
        assert str(caught.value).startswith("This model's maximum context length is 100 tokens")
        assert caught.value.param == param


def test_min_tokens_is_checked_against_the_resolved_maximum():
    params = SamplingParams(max_tokens=None, min_tokens=50)
    assert params.resolve(110, 60).max_tokens == 50
    with pytest.raises(RequestError) as caught:
        params.resolve(100, 60)
    assert caught.value.param == "min_tokens"


def fields_within_bounds() -> st.SearchStrategy[dict]:
    def of(bound: Bound) -> st.SearchStrategy:
        if bound.kind == "str":
            item = st.text(min_size=int(bound.minimum), max_size=8)
        elif bound.kind == "int":
            item = st.integers(int(bound.minimum), int(bound.maximum))
        else:
            item = st.floats(bound.minimum, bound.maximum, exclude_min=bound.exclusive_minimum)
        if bound.max_inner_items:
            item = st.lists(item, min_size=1, max_size=3)
        return item if bound.max_items is None else st.lists(item, min_size=bound.min_items, max_size=4)

    choices = {name: of(bound) for name, bound in BOUNDS.items()}
    choices["logit_bias"] = st.dictionaries(st.integers(0, MAX_VOCABULARY - 1), st.floats(-100, 100), max_size=4)
    choices |= dict.fromkeys(FLAGS, st.booleans())
    return st.fixed_dictionaries({}, optional=choices)


@given(fields_within_bounds())
def test_values_within_bounds_are_taken_or_conflict(fields):
    params, error = built(fields)
    if params is None:
        assert error.reason == "conflict" or error.param == "min_tokens"
        return
    for name, value in fields.items():
        kept = getattr(params, name)
        if name == "top_k":
            assert kept == max(value, 0)
        elif name in LISTS:
            assert [list(item) if isinstance(item, tuple) else item for item in kept] == value
        else:
            assert kept == value
    assert dataclasses.replace(params) == params


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(FIELDS)), junk)
def test_anything_else_is_an_error_that_names_a_field(name, value):
    params, error = built({name: value})
    if params is None:
        assert error.param.split(".")[0] in FIELDS
        assert "\n" not in str(error)
        return
    params.check_vocabulary(MAX_VOCABULARY)
