"""What holds tracers of a trace that may have ended."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from freeze_optax._state.tracers import holds_tracers


class Scaled:
    def __init__(self, by):
        self.by = by

    def of(self, x):
        return self.by * x


def closed_over(x):
    return lambda: x


def in_a_default(x):
    def function(y=x):
        return y

    return function


MAKERS = {
    "a value": lambda x: x,
    "a closure": closed_over,
    "a closure of a closure": lambda x: closed_over(closed_over(x)),
    "a default": in_a_default,
    "a partial": lambda x: functools.partial(max, x),
    "a keyword of a partial": lambda x: functools.partial(max, default=x),
    "a tree in a closure": lambda x: closed_over({"a": [x]}),
    "an optimizer": optax.adam,
    "a chain": lambda x: optax.chain(optax.clip(1.0), optax.adamw(x)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_tracers_are_found_where_functions_keep_them(make):
    found = []
    jax.eval_shape(lambda x: found.append(holds_tracers(make(x))), jnp.ones(()))
    assert found == [True]
    assert not holds_tracers(make(0.1))


def test_functions_that_refer_to_themselves_end():
    def recursive():
        return recursive

    assert not holds_tracers(recursive)


def test_a_name_that_is_not_bound_yet_holds_none_and_hides_none():
    def make(x):
        def function():
            return bound, after

        def looked():
            return holds_tracers(function)

        bound = x
        found = looked()
        after = 0
        return found, after

    found = []
    jax.eval_shape(lambda x: found.append(make(x)), jnp.ones(()))
    assert found == [(True, 0)]
    assert make(0.1) == (False, 0)


def test_what_has_a_function_or_an_owner_alone_is_no_bound_method():
    assert not holds_tracers(staticmethod(len))
    assert not holds_tracers([].append)
