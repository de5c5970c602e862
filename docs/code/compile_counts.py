"""Counts what JAX traces and compiles, by the events that it reports."""

import collections

import jax
from jax.experimental.compilation_cache import compilation_cache

# The build of the site keeps compiled programs on disk. Here each compilation counts.
jax.config.update("jax_compilation_cache_dir", None)
compilation_cache.reset_cache()

_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "traces",
    "/jax/core/compile/backend_compile_duration": "compilations",
    "/jax/compilation_cache/cache_hits": "cache hits",
}
_counts = collections.Counter()


def _count(event, *_, **__):
    if event in _EVENTS:
        _counts[_EVENTS[event]] += 1
        # JAX reports a program that it reads from the cache as compiled, too.
        _counts["compilations"] -= event.endswith("cache_hits")


jax.monitoring.register_event_listener(_count)
jax.monitoring.register_event_duration_secs_listener(_count)


def new_counts():
    """What was traced and compiled since the last call."""
    counts = {name: number for name, number in _counts.items() if number}
    _counts.clear()
    return counts
