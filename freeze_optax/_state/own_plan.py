"""`OwnPlan`: what `Layout` knows of a `FreezeState`, which is made of a layout."""


class OwnPlan:
    """A node of a state with a plan of what is frozen in it."""
