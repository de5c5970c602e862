"""PyTorch's transfer learning guide: a new head on ResNet-18, the end of BERT, and "lr = 0"."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import freeze_optax as fo
from freeze_optax import linen
from tests.support import models

pytestmark = pytest.mark.usefixtures("standard_promotion")

IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
TOKENS = jax.ShapeDtypeStruct((1, 16), "int32")


@functools.cache
def resnet(classes: int) -> Any:
    """ResNet-18 without an array: shapes and dtypes."""
    return jax.eval_shape(models.ResNet(classes).init, jax.random.key(0), IMAGE)


@functools.cache
def resnet_with_new_head() -> dict[str, Any]:
    """Pretrained on 1000 classes, with a head for ten: `model.fc = nn.Linear(512, 10)`."""
    return {**resnet(1000)["params"], "fc": resnet(10)["params"]["fc"]}


@functools.cache
def bert() -> Any:
    return jax.eval_shape(models.Bert().init, jax.random.key(0), TOKENS, TOKENS)["params"]


@functools.cache
def modules_of_resnet() -> Any:
    return linen.modules(models.ResNet(10), IMAGE)


@functools.cache
def modules_of_bert() -> Any:
    return linen.modules(models.Bert(), TOKENS, TOKENS)


def size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def trainable(params: Any, spec: Any) -> int:
    return size(fo.partition(params, spec)[0])


def nbytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def assert_close(actual: Any, expected: Any, rtol: float = 1e-6) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol), actual, expected)


def test_the_models_have_the_parameters_that_their_papers_give_them():
    assert size(resnet(1000)["params"]) == 11_689_512
    # 4,800 channels with a mean and a variance each, which no optimizer sees.
    assert size(resnet(1000)["batch_stats"]) == 9_600
    assert size(resnet_with_new_head()) == 11_689_512 - (512 * 1000 + 1000) + 5_130
    assert size(bert()) == 109_482_240


BACKBONE = {
    "all but the head": lambda: ~fo.path("fc"),
    "the difference": lambda: fo.everything - "fc",
    "the parts": lambda: ["conv1", "bn1", "layer{1..4}"],
    "the stages": lambda: [fo.layers("layer*")[:4], "{conv,bn}1"],
    "the types of the backbone": lambda: fo.of_type(
        nn.Conv, nn.BatchNorm, modules=modules_of_resnet()
    ),
    "all but the type of the head": lambda: ~fo.of_type(nn.Dense, modules=modules_of_resnet()),
    "a mask": lambda: {name: name != "fc" for name in resnet_with_new_head()},
}


@pytest.mark.parametrize("spec", BACKBONE)
def test_a_new_head_on_resnet_18_leaves_5130_parameters_to_train(spec):
    params, frozen = resnet_with_new_head(), BACKBONE[spec]()
    expected = {
        name: jax.tree.map(lambda _, name=name: name != "fc", below)
        for name, below in params.items()
    }
    assert fo.mask(frozen, params) == expected
    assert trainable(params, frozen) == 512 * 10 + 10 == 5_130


@pytest.mark.parametrize(("fields", "count"), [((), 9_600), (("scale",), 4_800)])
def test_batch_norm_of_resnet_18_is_frozen_by_its_type(fields, count):
    params = resnet_with_new_head()
    frozen = fo.of_type(nn.BatchNorm, fields=fields, modules=modules_of_resnet())
    # Channels: the stem has 64; a stage has two blocks of two, and from the second stage on a
    # projection. Each has a scale and a bias.
    channels = 64 + 4 * 64 + 5 * (128 + 256 + 512)
    assert size(params) - trainable(params, frozen) == channels * (len(fields) or 2) == count
    mask = fo.mask(frozen, params)
    for flag, (path, _) in zip(
        jax.tree.leaves(mask), jax.tree_util.tree_leaves_with_path(params), strict=True
    ):
        in_norm = "bn" in path[-2].key
        assert flag == (in_norm and (not fields or path[-1].key in fields))


def early(module: nn.Module, path: str) -> bool:
    return isinstance(module, models.EncoderLayer) and int(path.rpartition("_")[2]) < 10


ALL_BUT_THE_END = {
    "paths": lambda: ["embeddings", "encoder/layer_{0..9}"],
    "all but the paths": lambda: ~fo.path("encoder/layer_{10,11}", "pooler"),
    "a regex": lambda: fo.regex(r"embeddings/.*", r"encoder/layer_\d/.*"),
    "layers": lambda: ["embeddings", fo.layers("encoder/layer_*")[:-2]],
    "all but layers": lambda: ~(fo.layers("encoder/layer_*")[10:] | "pooler"),
    "types": lambda: [
        fo.of_type(models.Embeddings, modules=modules_of_bert()),
        fo.by_module(early, modules=modules_of_bert()),
    ],
}


@pytest.mark.parametrize("spec", ALL_BUT_THE_END)
def test_the_end_of_bert_base_leaves_14766336_parameters_to_train(spec):
    params, frozen = bert(), ALL_BUT_THE_END[spec]()
    moving = {"layer_10", "layer_11", "pooler"}
    expected = jax.tree_util.tree_map_with_path(
        lambda path, _: moving.isdisjoint(entry.key for entry in path), params
    )
    assert fo.mask(frozen, params) == expected
    attention = 4 * (768 * 768 + 768)
    feed_forward = 768 * 3072 + 3072 + 3072 * 768 + 768
    layer = attention + feed_forward + 2 * 2 * 768
    assert trainable(params, frozen) == 2 * layer + 768 * 768 + 768 == 14_766_336


def test_layer_norm_of_bert_base_is_frozen_by_its_type():
    frozen = fo.of_type(nn.LayerNorm, modules=modules_of_bert())
    norms = 1 + 2 * 12
    assert size(bert()) - trainable(bert(), frozen) == norms * 2 * 768 == 38_400


def test_a_layer_that_is_not_there_is_an_error_at_real_size_too():
    with pytest.raises(ValueError, match=r"'encoder/layer_12' selects no leaf; nearest: 'encoder"):
        fo.mask("encoder/layer_12", bert())
    with pytest.raises(ValueError, match="no module is a Dropout"):
        fo.mask(fo.of_type(nn.Dropout, modules=modules_of_bert()), bert())
    with pytest.raises(IndexError, match="'encoder/layer_\\*' names 12 nodes"):
        fo.mask(fo.layers("encoder/layer_*")[12], bert())


@pytest.mark.parametrize(
    ("params", "spec", "count"),
    [
        pytest.param(resnet_with_new_head, BACKBONE["the parts"], 5_130, id="ResNet"),
        pytest.param(bert, ALL_BUT_THE_END["types"], 14_766_336, id="BERT"),
        pytest.param(bert, lambda: fo.nothing, 109_482_240, id="BERT, nothing frozen"),
    ],
)
def test_adam_keeps_two_moments_of_what_trains_and_a_count(params, spec, count):
    tx = fo.freezable(optax.adam(1e-3), spec())
    assert nbytes(jax.eval_shape(tx.init, params())) == 2 * 4 * count + 4


SMALL = models.ResNet(classes=3, width=2, blocks=(1, 1))
IMAGES = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
CLASSES = jnp.array([0, 2, 1, 2])


def loss_of_logits(logits: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, CLASSES).mean()


def test_fine_tuning_a_head_is_training_the_head_alone():
    variables = SMALL.init(jax.random.key(0), IMAGES)
    params, stats = variables["params"], variables["batch_stats"]
    tx = fo.freezable(optax.sgd(0.5, momentum=0.9), ~fo.path("fc"))

    def loss(params):
        return loss_of_logits(SMALL.apply({"params": params, "batch_stats": stats}, IMAGES))

    @jax.jit
    def step(params, state):
        grads = fo.grad(loss, frozen=state)(params)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, frozen=state), state

    new, state = params, tx.init(params)
    for _ in range(3):
        new, state = step(new, state)

    # Only the head, as a linear model of what stands before it, in NumPy.
    _, seen = SMALL.apply(variables, IMAGES, capture_intermediates=True, mutable="intermediates")
    features = np.asarray(seen["intermediates"]["layer2"]["__call__"][0]).mean((1, 2))
    head = {name: np.asarray(leaf, np.float64) for name, leaf in params["fc"].items()}
    moments = {name: np.zeros_like(leaf) for name, leaf in head.items()}
    for _ in range(3):
        odds = np.exp(features @ head["kernel"] + head["bias"])
        error = (odds / odds.sum(1, keepdims=True) - np.eye(3)[CLASSES]) / 4
        grads = {"kernel": features.T @ error, "bias": error.sum(0)}
        for name, grad in grads.items():
            moments[name] = 0.9 * moments[name] + grad
            head[name] -= 0.5 * moments[name]
    assert_close(new["fc"], head, rtol=1e-4)
    assert np.abs(np.asarray(new["fc"]["kernel"] - params["fc"]["kernel"])).min() > 1e-3
    fo.testing.assert_frozen({**params, "fc": 0.0}, {**new, "fc": 0.0}, True)


def test_statistics_move_in_training_mode_whatever_is_frozen_and_hold_keeps_them():
    variables = SMALL.init(jax.random.key(0), IMAGES)
    _, mutated = SMALL.apply(variables, IMAGES, train=True, mutable="batch_stats")
    old, new = variables["batch_stats"], mutated["batch_stats"]
    _, seen = SMALL.apply(variables, IMAGES, capture_intermediates=True, mutable="intermediates")
    stem = np.asarray(seen["intermediates"]["conv1"]["__call__"][0])
    np.testing.assert_allclose(
        new["bn1"]["mean"], 0.01 * stem.mean((0, 1, 2)), rtol=1e-4, atol=1e-6
    )
    held = fo.hold(new, old, "**/bn1")
    for path, leaf in jax.tree_util.tree_leaves_with_path(held):
        source = old if any(entry.key == "bn1" for entry in path) else new
        for entry in path:
            source = source[entry.key]
        assert leaf is source


# What follows is the guide's other way: "set the learning rate of the frozen parameters to 0".
# In optax it is a mask after the optimizer. The gradient is 1 throughout, and "a" starts at 1.0.

FROZEN, MOVING = {"a": True, "b": False}, {"a": False, "b": False}
ONES = {"a": jnp.ones(()), "b": jnp.ones(2)}


def momentum_with_lr_zero(mask: Any, *after: Any) -> optax.GradientTransformation:
    zeroed = optax.masked(optax.set_to_zero(), mask)
    return optax.chain(optax.trace(0.9), zeroed, *after, optax.scale(-0.1))


def run_lr_zero(tree: Any, masks: list[Any], grads: Any = ONES) -> Any:
    state = momentum_with_lr_zero(masks[0]).init(tree)
    for mask in masks:
        updates, state = momentum_with_lr_zero(mask).update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree


def run_frozen(tree: Any, keep_state: bool, grads: Any = ONES) -> Any:
    tx = fo.freezable(optax.sgd(0.1, momentum=0.9))
    state = tx.init(tree)
    for step in range(5):
        if step == 1:
            state = fo.freeze(state, tree, "a", keep_state=keep_state)
        if step == 4:
            state = fo.thaw(state, tree, "a")
        updates, state = tx.update(grads if 0 < step < 4 else ONES, state, tree)
        tree = fo.apply_updates(tree, updates, frozen=state)
    return tree


def momentum_by_hand(while_frozen: str) -> float:
    """One leaf in five steps of which the middle three are frozen."""
    value, moment = 1.0, 0.0
    for step in range(5):
        frozen = 0 < step < 4
        if frozen and while_frozen == "dropped":
            moment = 0.0
        if not frozen or while_frozen == "moving":
            moment = 0.9 * moment + 1.0
        if not frozen:
            value -= 0.1 * moment
    return value


def assert_run(tree: Any, expected: float, by_hand: str) -> None:
    np.testing.assert_allclose(momentum_by_hand(by_hand), expected, rtol=1e-12)
    # "b" is trained in all five steps.
    moments = np.cumsum(0.9 ** np.arange(5))
    assert_close(tree, {"a": np.float32(expected), "b": np.full(2, 1 - 0.1 * moments.sum())})


def test_with_lr_zero_moments_keep_moving_so_the_next_trained_step_leaps():
    after_one = run_lr_zero(ONES, [MOVING])
    assert_close(after_one, {"a": np.float32(0.9), "b": np.full(2, 0.9)})
    while_frozen = run_lr_zero(ONES, [MOVING, FROZEN, FROZEN, FROZEN])
    assert while_frozen["a"] == after_one["a"]
    assert_run(run_lr_zero(ONES, [MOVING, *[FROZEN] * 3, MOVING]), 0.49049, "moving")


def test_a_parked_leaf_steps_on_from_the_momentum_that_it_stopped_with():
    assert_run(run_frozen(ONES, keep_state=True), 0.71, "parked")


def test_a_dropped_leaf_starts_its_momentum_afresh():
    assert_run(run_frozen(ONES, keep_state=False), 0.8, "dropped")


def test_with_lr_zero_a_nan_waits_in_the_moments_of_a_frozen_leaf():
    bad = {"a": jnp.array(jnp.nan), "b": ONES["b"]}
    tx, state = momentum_with_lr_zero(FROZEN), momentum_with_lr_zero(FROZEN).init(ONES)
    updates, state = tx.update(bad, state, ONES)
    tree = optax.apply_updates(ONES, updates)
    assert tree["a"] == 1.0
    updates, _ = momentum_with_lr_zero(MOVING).update(ONES, state, tree)
    assert jnp.isnan(optax.apply_updates(tree, updates)["a"])
    assert_run(run_frozen(ONES, keep_state=True, grads=bad), 0.71, "parked")
    assert_run(run_frozen(ONES, keep_state=False, grads=bad), 0.8, "dropped")


def test_with_lr_zero_frozen_leaves_keep_their_state():
    tree = {"a": jnp.ones(100), "b": jnp.ones(2)}
    assert nbytes(momentum_with_lr_zero(FROZEN).init(tree)) == 102 * 4
    assert nbytes(fo.freezable(optax.sgd(0.1, momentum=0.9), "a").init(tree)) == 2 * 4
    assert nbytes(fo.freezable(optax.sgd(0.1, momentum=0.9), FROZEN).init(tree)) == 2 * 4


def test_with_lr_zero_weight_decay_that_comes_after_still_decays():
    decay = optax.add_decayed_weights(0.5)
    tx = momentum_with_lr_zero(FROZEN, decay)
    updates, _ = tx.update(ONES, tx.init(ONES), ONES)
    # 1 - 0.1 * (0 + 0.5) and 1 - 0.1 * (1 + 0.5).
    expected = {"a": np.float32(0.95), "b": np.full(2, 0.85)}
    assert_close(optax.apply_updates(ONES, updates), expected)

    tx = fo.freezable(optax.chain(optax.trace(0.9), decay, optax.scale(-0.1)), FROZEN)
    state = tx.init(ONES)
    updates, state = tx.update(ONES, state, ONES)
    new = fo.apply_updates(ONES, updates, frozen=state)
    assert_close(new, {"a": np.float32(1.0), "b": np.full(2, 0.85)})
    assert new["a"] is ONES["a"]
