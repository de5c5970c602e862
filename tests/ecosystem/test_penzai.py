"""Penzai: models whose parameters are mutable objects, and frozen values inside of a step."""

import jax
import jax.numpy as jnp
import optax
import pytest

import freeze_optax as fo
from tests.support.bare_steps import DECAYING_ADAM, assert_same_bits, bare_steps, steps_with

pz = pytest.importorskip("penzai.pz", reason="make lane-ecosystem installs it")
basic_training = pytest.importorskip("penzai.toolshed.basic_training")

pytestmark = pytest.mark.usefixtures("standard_promotion")

X = pz.nx.wrap(jnp.linspace(-1.0, 1.0, 3)).tag("x")


def new_model():
    key = jax.random.key(0)
    layers = [("a", 3, 4), ("b", 4, 2)]
    affine = pz.nn.Affine.from_config
    return pz.nn.Sequential([affine(name, key, {"x": i}, {"x": o}) for name, i, o in layers])


def loss_of(model):
    return (model(X).unwrap("x") ** 2).sum()


def labelled(start):
    def of_label(module, path):
        return isinstance(module, pz.ParameterValue) and module.label.startswith(start)

    return fo.by_module(of_label)


@pytest.mark.parametrize(
    ("spec", "trains"),
    [
        ("sublayers/0", lambda path: path.startswith("sublayers/1/")),
        (labelled("a/"), lambda path: path.startswith("sublayers/1/")),
        (fo.of_type(pz.nn.Linear), lambda path: "/bias/" in path),
    ],
    ids=["path", "label", "type"],
)
def test_a_model_of_frozen_values_trains_as_by_hand(spec, trains):
    before = pz.freeze_params(new_model())
    after = steps_with(spec, loss_of, before)
    assert_same_bits(after, bare_steps(loss_of, before, trains))


def test_mutable_parameters_are_no_leaves_to_train():
    with pytest.warns(UserWarning, match="all 4 leaves are frozen, nothing is left to train"):
        fo.freezable(optax.adam(0.1)).init(new_model())


def test_its_trainer_thaws_between_two_steps():
    model = new_model()
    tx = fo.freezable(DECAYING_ADAM, labelled("a/"))

    def trainer_loss(*, model, state, rng):
        return loss_of(model), state, {}

    trainer = basic_training.StatefulTrainer.build(jax.random.key(0), model, tx, trainer_loss)
    before = pz.freeze_params(model)
    for _ in range(3):
        trainer.step()
    after = pz.freeze_params(model)
    by_hand = bare_steps(loss_of, before, lambda path: path.startswith("sublayers/1/"))
    assert_same_bits(after, by_hand)

    _, params = pz.unbind_params(model, freeze=True)
    trainer.state.value = fo.thaw(trainer.state.value, params, labelled("a/"))
    assert fo.summary(params, trainer.state.value).frozen == 0
    trainer.step()
    first = bare_steps(loss_of, after, lambda path: path.startswith("sublayers/0/"), steps=1)
    moved = pz.freeze_params(model)
    assert_same_bits(moved.sublayers[0], first.sublayers[0])


def test_its_trainer_refuses_params_that_it_does_not_train():
    # penzai 0.2.5: `build` makes the state for all params, `step` updates those that train.
    model = new_model()
    fixed = pz.select(model).at_instances_of(pz.Parameter).pick_nth_selected(0)
    model = fixed.apply(
        lambda p: pz.Parameter(value=p.value, label=p.label, metadata={"trainable": False})
    )
    trainer = basic_training.StatefulTrainer.build(
        jax.random.key(0),
        model,
        optax.adam(0.1),
        lambda *, model, state, rng: (loss_of(model), state, {}),
    )
    with pytest.raises(ValueError, match="different lengths of tuple"):
        trainer.step()
