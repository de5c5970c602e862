"""Two well-known models in Linen, at any size: ResNets of basic blocks and BERT."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class BasicBlock(nn.Module):
    """Two convolutions, and a shortcut that is projected where the shape changes."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.Conv(self.width, (3, 3), self.stride, 1, use_bias=False, name="conv1")(x)
        y = nn.relu(nn.BatchNorm(not train, name="bn1")(y))
        y = nn.Conv(self.width, (3, 3), 1, 1, use_bias=False, name="conv2")(y)
        y = nn.BatchNorm(not train, name="bn2")(y)
        if x.shape != y.shape:
            strides = self.stride
            x = nn.Conv(self.width, (1, 1), strides, use_bias=False, name="downsample_conv")(x)
            x = nn.BatchNorm(not train, name="downsample_bn")(x)
        return nn.relu(x + y)


class Stage(nn.Module):
    """Blocks of one width, of which the first may halve the image."""

    width: int
    blocks: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(self.blocks):
            stride = self.stride if i == 0 else 1
            x = BasicBlock(self.width, stride, name=f"block_{i}")(x, train)
        return x


class ResNet(nn.Module):
    """A residual network for images; by default ResNet-18."""

    classes: int = 1000
    width: int = 64
    blocks: tuple[int, ...] = (2, 2, 2, 2)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(self.width, (7, 7), 2, 3, use_bias=False, name="conv1")(x)
        x = nn.relu(nn.BatchNorm(not train, name="bn1")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, blocks in enumerate(self.blocks):
            stage = Stage(self.width << i, blocks, 2 if i else 1, name=f"layer{i + 1}")
            x = stage(x, train)
        return nn.Dense(self.classes, name="fc")(x.mean((1, 2)))


class Embeddings(nn.Module):
    """The sum of what a token, its position and its segment stand for."""

    vocab: int
    positions: int
    types: int
    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array, types: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocab, self.width, name="word")(tokens)
        x += nn.Embed(self.positions, self.width, name="position")(jnp.arange(tokens.shape[-1]))
        x += nn.Embed(self.types, self.width, name="token_type")(types)
        return nn.LayerNorm(1e-12, name="norm")(x)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each added to its input and normalised."""

    heads: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.MultiHeadDotProductAttention(self.heads, name="attention")(x)
        x = nn.LayerNorm(1e-12, name="attention_norm")(x + y)
        y = nn.gelu(nn.Dense(4 * self.width, name="intermediate")(x), approximate=False)
        y = nn.Dense(self.width, name="output")(y)
        return nn.LayerNorm(1e-12, name="output_norm")(x + y)


class Encoder(nn.Module):
    """The stack of layers."""

    layers: int
    heads: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = EncoderLayer(self.heads, self.width, name=f"layer_{i}")(x)
        return x


class Bert(nn.Module):
    """BERT with its pooler; by default BERT-base, uncased."""

    vocab: int = 30_522
    positions: int = 512
    types: int = 2
    width: int = 768
    layers: int = 12
    heads: int = 12

    @nn.compact
    def __call__(self, tokens: jax.Array, types: jax.Array) -> tuple[jax.Array, jax.Array]:
        sizes = (self.vocab, self.positions, self.types, self.width)
        x = Embeddings(*sizes, name="embeddings")(tokens, types)
        x = Encoder(self.layers, self.heads, self.width, name="encoder")(x)
        return x, nn.tanh(nn.Dense(self.width, name="pooler")(x[:, 0]))
