"""Small Linen models, one for each way to write one, and by hand what each is made of."""

import typing

import jax
import jax.numpy as jnp
from flax import linen as nn

X = jax.ShapeDtypeStruct((2, 3), jnp.float32)


class Block(nn.Module):
    width: int = 3

    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm(name="norm")(nn.Dense(self.width)(x))


class Encoder(nn.Module):
    def setup(self):
        self.first = Block()
        self.rest = [Block(), nn.Dense(3)]
        self.gain = self.param("gain", nn.initializers.ones, (3,))

    def __call__(self, x):
        x = self.first(x)
        for layer in self.rest:
            x = layer(x)
        return x * self.gain


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Encoder(name="encoder")(x)
        return nn.Dense(2, name="head")(nn.relu(nn.Dense(3)(x)))


class Twice(nn.Module):
    def setup(self):
        self.block = Block()

    def __call__(self, x):
        return self.block(self.block(x))


class Attribute(nn.Module):
    inner: nn.Module
    layers: typing.Any = ()

    @nn.compact
    def __call__(self, x):
        for layer in (self.inner, *self.layers):
            x = layer(x)
        return nn.Dense(2)(x)


class Tied(nn.Module):
    """Two modules share one that the first of them owns."""

    def setup(self):
        self.shared = nn.Dense(3)
        self.one = Attribute(self.shared)
        self.two = Attribute(self.shared)

    def __call__(self, x):
        return self.one(x) + self.two(x)


class Weights(nn.Module):
    def setup(self):
        self.table = self.param("table", nn.initializers.ones, (3, 3))
        self.dense = nn.Dense(3)


class ReadsWeights(nn.Module):
    def setup(self):
        self.weights = Weights()

    def __call__(self, x):
        return self.weights.dense(x @ self.weights.table)


class Holder(nn.Module):
    layers: typing.Any


class Bypassed(nn.Module):
    """Calls what another module holds, and never that module."""

    holder: nn.Module

    def __call__(self, x):
        return self.holder.layers[0](x)


class Step(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return Block(name="block")(carry), None


STACK = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
Scanned = nn.scan(Step, length=2, **STACK)
ScannedRemat = nn.scan(nn.remat(Step), length=2, **STACK)
Vmapped = nn.vmap(Block, in_axes=None, axis_size=2, **STACK)
RematScan = nn.remat_scan(Block, lengths=(2, 2))
Mapped = nn.map_variables(Block, "params", lambda v: v, init=True)


class Lifts(nn.Module):
    @nn.compact
    def __call__(self, x):
        x, _ = Scanned(name="scanned")(x, None)
        x, _ = ScannedRemat(name="both")(x, None)
        x = nn.remat(nn.remat(Block))(name="remat")(x)
        x = Mapped(name="mapped")(x)
        return Vmapped(name="vmapped")(x)


class LiftedMethod(nn.Module):
    @nn.remat
    @nn.compact
    def __call__(self, x):
        return Block()(x)


class LiftedFunction(nn.Module):
    @nn.compact
    def __call__(self, x):
        cell = Block(name="cell")

        def body(module, carry, _):
            return module(carry), None

        lift = nn.scan(body, variable_broadcast="params", split_rngs={"params": False}, length=2)
        return lift(cell, x, None)[0]


class Jitted(nn.Module):
    """Blocks that differ by nothing but their names."""

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = nn.jit(Block)(name=f"block_{i}")(x)
        return x


JittedBlock = nn.jit(Block)


class JittedByOneClass(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = JittedBlock(name=f"block_{i}")(x)
        return x


class JittedMethod(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return Block()(x)


class LowRank(nn.Module):
    """As in the documentation of `nn.share_scope`: its params stand beside those of `inner`."""

    inner: nn.Module

    def setup(self):
        nn.share_scope(self, self.inner)

    @nn.compact
    def __call__(self, x):
        a = self.param("a", nn.initializers.ones, (3, 1))
        b = self.param("b", nn.initializers.zeros, (1, 3))
        return self.inner(x) + x @ a @ b


class Adapted(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = LowRank(nn.Dense(3, name="adapted"))(x)
        return nn.Dense(2, name="head")(x)


class Teacher(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm(name="layer")(nn.Dense(3, name="other")(x))


class Student(nn.Module):
    """Runs another model inside, whose params are none of its own."""

    @nn.compact
    def __call__(self, x):
        target, _ = Teacher().init_with_output(jax.random.key(0), x)
        return nn.Dense(3, name="layer")(x) - target


def under(prefix, *names):
    return {f"{prefix}/{name}".strip("/") for name in names}


def block(prefix):
    """The modules of a Block at a path."""
    (dense,), (norm,) = under(prefix, "Dense_0"), under(prefix, "norm")
    return {prefix: Block, dense: nn.Dense, norm: nn.LayerNorm}


def blocks(*prefixes):
    return {path: kind for prefix in prefixes for path, kind in block(prefix).items()}


# Of each model the class at each path, and all of its leaves that are not of a Dense or LayerNorm.
MODELS = {
    "bare": (nn.Dense(2), {"": nn.Dense}, set()),
    "compact": (
        Compact(),
        {
            "": Compact,
            "encoder": Encoder,
            **blocks("encoder/first", "encoder/rest_0"),
            **dict.fromkeys(("encoder/rest_1", "head", "Dense_0"), nn.Dense),
        },
        {"encoder/gain"},
    ),
    "called twice": (Twice(), {"": Twice, **blocks("block")}, set()),
    "attribute": (
        Attribute(Block(), [nn.Dense(3), Block()]),
        {"": Attribute, **blocks("inner", "layers_1"), "layers_0": nn.Dense, "Dense_0": nn.Dense},
        set(),
    ),
    "tied": (
        Tied(),
        {
            "": Tied,
            "one": Attribute,
            "two": Attribute,
            **dict.fromkeys(("shared", "one/Dense_0", "two/Dense_0"), nn.Dense),
        },
        set(),
    ),
    "sequential": (
        nn.Sequential([nn.Dense(3), nn.relu, Block()]),
        {"": nn.Sequential, "layers_0": nn.Dense, **blocks("layers_2")},
        set(),
    ),
    "only read": (
        ReadsWeights(),
        {"": ReadsWeights, "weights": Weights, "weights/dense": nn.Dense},
        {"weights/table"},
    ),
    "bypassed": (
        Bypassed(Holder([nn.Dense(3)])),
        {"": Bypassed, "holder": Holder, "holder/layers_0": nn.Dense},
        set(),
    ),
    "lifts": (
        Lifts(),
        {
            "": Lifts,
            **dict.fromkeys(("scanned", "both"), Step),
            **blocks("scanned/block", "both/block", "remat", "mapped", "vmapped"),
        },
        set(),
    ),
    "lifted method": (LiftedMethod(), {"": LiftedMethod, **blocks("Block_0")}, set()),
    "lifted function": (LiftedFunction(), {"": LiftedFunction, **blocks("cell")}, set()),
    "vmap at the root": (Vmapped(), blocks(""), set()),
    "remat at the root": (nn.remat(Block)(), blocks(""), set()),
    "remat_scan at the root": (RematScan(), blocks(""), set()),
    "jit": (Jitted(), {"": Jitted, **blocks("block_0", "block_1", "block_2")}, set()),
    "jit once": (
        JittedByOneClass(),
        {"": JittedByOneClass, **blocks("block_0", "block_1", "block_2")},
        set(),
    ),
    "jitted method": (JittedMethod(), {"": JittedMethod, **blocks("Block_0")}, set()),
    "a model inside": (Student(), {"": Student, "layer": nn.Dense}, set()),
}
