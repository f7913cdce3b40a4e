from dataclasses import dataclass, field

import pytest

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.schema import (
    build,
    did_you_mean,
    parse_fields,
    schema_of,
    shown,
    validate,
)


@dataclass
class Inner:
    rate: float = 0.5


@dataclass
class Outer:
    size: int
    name: str = "x"
    inner: Inner | None = None
    metadata: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size must be 1 or more, got {self.size}")


def lines_of(function, *args):
    with pytest.raises(SettingsError) as caught:
        function(*args)
    return str(caught.value).splitlines()


def test_values_that_are_set_are_converted():
    schema = schema_of(Outer)
    assert validate(schema, {"size": "3", "inner": {"rate": 1}}) == {
        "size": 3,
        "inner": {"rate": 1.0},
    }


def test_fields_left_out_and_added():
    schema = schema_of(Outer, without={"name"}, extra={"seed": (int, 0)})
    assert validate(schema, {"size": 1, "seed": 2}) == {"size": 1, "seed": 2}
    assert lines_of(validate, schema, {"size": 1, "name": "a"})[0].startswith("name: unknown key")
    assert lines_of(validate, schema, {"size": 1, "metadata": {}})[0].startswith("metadata: ")


def test_each_mistake_is_a_line_with_the_whole_key():
    values = {"inner": {"rat": 1, "rate": "fast"}, "size": 1.5}
    lines = lines_of(validate, schema_of(Outer), values, "sae")
    assert lines == [
        "sae.size must be a valid integer, got 1.5",
        "sae.inner.rate must be a valid number, got 'fast'",
        "sae.inner.rat: unknown key, did you mean 'rate'?",
    ]


def test_errors_of_the_class_get_its_key():
    assert lines_of(parse_fields, Outer, {"size": 0}, "sae") == [
        "sae.size must be 1 or more, got 0"
    ]
    assert lines_of(build, lambda: {}["a"], "model") == ["model: missing key 'a'"]
    assert lines_of(build, lambda: int("x"), "model")[0].startswith("model: invalid literal")


def test_a_suggestion_needs_a_similar_name():
    assert did_you_mean("sead", ["seed", "lr"]) == ", did you mean 'seed'?"
    assert did_you_mean("something", ["seed", "lr"]) == ""


def test_long_values_are_cut():
    assert len(shown("x" * 10_000)) < 310
    assert len(shown([["a" * 50] * 50] * 50)) < 310
    assert shown(3) == "3"
