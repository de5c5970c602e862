"""What a selector selects, and a module that declares a frozen field."""

import typing

import equinox as eqx
import jax


def selection(selector, tree):
    """The paths of the selected leaves, read from the mask by jax alone."""
    mask = selector(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    found = jax.tree_util.tree_leaves_with_path(mask)
    return [jax.tree_util.keystr(k, simple=True, separator="/") for k, flag in found if flag]


class Masked(eqx.Module):
    weight: typing.Any
    mask: typing.Any
    frozen_fields = ("mask",)
