"""`scan` of a stack in host memory, called in another way than it needs."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import freeze_optax as fo
from tests.support.memories import jit_keeps_memory, on_host

PARAMS = {"layers": {"w": jnp.full((3, 2, 2), 0.5), "b": jnp.ones((3, 2))}, "head": jnp.ones(2)}
HOSTED = {**PARAMS, "layers": {**PARAMS["layers"], "w": on_host(PARAMS["layers"]["w"])}}
X = jnp.ones((1, 2))

# The types of JAX 0.7.1 do not name the memory, so there it computes with both.
types_tell = pytest.mark.skipif(not jit_keeps_memory(), reason="JAX 0.7.1 does not tell")


def run(params, **kwargs):
    def layer(x, p):
        return jnp.tanh(x @ p["w"] + p["b"]), None

    return (fo.scan(layer, X, params["layers"], **kwargs)[0] @ params["head"]).sum()


@types_tell
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "frozen", [fo.nothing, True, fo.rows("w", [0])], ids=["none", "all", "rows"]
)
def test_without_stream_the_error_names_the_leaf_and_says_stream(frozen, wrap):
    with pytest.raises(ValueError, match=r"layers in host memory, 'w', .*frozen=…, stream=T"):
        wrap(lambda params: run(params, frozen=frozen))(HOSTED)


@types_tell
def test_in_a_gradient_the_error_has_the_path_in_the_params():
    with pytest.raises(
        ValueError, match=r"in host memory are 'layers/w', .*fo\.scan\(…, stream=Tru"
    ):
        fo.grad(run, "layers")(HOSTED)


def test_an_error_of_the_layer_itself_stays_what_it_is():
    def layer(x, p):
        raise ValueError("of the layer")

    with pytest.raises(ValueError, match=r"^of the layer"):
        fo.scan(layer, X, HOSTED["layers"])


def test_a_state_of_all_params_is_no_spec_for_the_layers():
    state = fo.freezable(optax.identity(), "layers").init(PARAMS)
    with pytest.raises(ValueError, match=r"only in the tree: 'b', 'w'.*fo\.mask\(state, params\)"):
        run(PARAMS, frozen=state)
    frozen = fo.mask(state, PARAMS)["layers"]
    np.testing.assert_array_equal(run(PARAMS, frozen=frozen), run(PARAMS))


def test_stream_without_anything_frozen_warns_that_nothing_is_streamed():
    with pytest.warns(UserWarning, match=r"brings 'w' .* as a whole.*\(frozen=True: all"):
        value = run(HOSTED, stream=True)
    np.testing.assert_array_equal(value, run(PARAMS))


@pytest.mark.parametrize("frozen", [True, "w", fo.rows("w", [0]) | fo.rows("b", [0])], ids=repr)
def test_where_some_of_it_is_streamed_there_is_no_warning(frozen):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(run(HOSTED, stream=True, frozen=frozen), run(PARAMS))
        np.testing.assert_array_equal(run(PARAMS, stream=True), run(PARAMS))
