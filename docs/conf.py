"""How Sphinx builds the site: `make docs`. Nothing is fetched while it builds."""

import hashlib
import inspect
import os
import re
import sys
import zlib
from pathlib import Path

import freeze_optax

HERE = Path(__file__).parent
BUILD = HERE.parent / "build"

# The pages run in kernels of their own, which find the models of the pages by this path.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(HERE / "code"), str(HERE.parent), os.environ.get("PYTHONPATH")])
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The pages compile the same small programs: one keeps them for the next.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(BUILD / "docs-programs")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
sys.path.insert(0, str(HERE / "code"))


def _code_hash() -> str:
    """The hash of all code that a page imports from here.

    myst-nb keeps outputs by the cells of a page alone: without this, those of an older package.
    """
    files = sorted([*(HERE.parent / "freeze_optax").rglob("*.py"), *(HERE / "code").glob("*.py")])
    files.append(HERE / "notebooks" / "minilm.py")  # of which two others run some sections
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


project = "freeze_optax"
author = "The freeze_optax authors"
copyright = f"2026, {author}"  # noqa: A001 (the name that Sphinx reads)
version = release = freeze_optax.__version__
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["code", "*.py", "notebooks/*.ipynb", "notebooks/store.py"]
nitpicky = True

html_theme = "furo"
html_title = f"freeze_optax {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["search.js"]
html_search_scorer = str(HERE / "static" / "scorer.js")
html_copy_source = False
html_show_sphinx = False
html_domain_indices = False
html_theme_options = {"navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Pages in Markdown. Those with a kernel in their head are executed, and so are the notebooks.
source_suffix = {".md": "myst-nb", ".py": "myst-nb"}
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "cache"
nb_execution_cache_path = str(BUILD / "docs-cache" / _code_hash())
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_merge_streams = True
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

autodoc_typehints = "none"  # the docstrings say what an argument is
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False


def _inventory(name: str) -> str:
    """Makes Sphinx's inventory of other documentation from the names that we link to.

    Inventories as others publish them list thousands of names, and would have to be fetched.
    """
    lines = (HERE / "inventories" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    entries = "".join(
        "{} {} 1 {} -\n".format(*line.split()) for line in lines if not line.startswith("#")
    )
    head = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    path = BUILD / "inventories" / f"{name}.inv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head.encode() + zlib.compress(entries.encode()))
    return str(path)


intersphinx_mapping = {
    "python": ("https://docs.python.org/3/", _inventory("python")),
    "jax": ("https://docs.jax.dev/en/latest/", _inventory("jax")),
    "optax": ("https://optax.readthedocs.io/en/latest/", _inventory("optax")),
    "flax": ("https://flax.readthedocs.io/en/latest/", _inventory("flax")),
    "linen": ("https://flax-linen.readthedocs.io/en/latest/", _inventory("linen")),
}

_LINKED = {
    line.split()[0]
    for path in (HERE / "inventories").glob("*.txt")
    for line in path.read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
}
_PUBLIC = {name for name in vars(freeze_optax) if not name.startswith("_")}
_PREFIXES = {"nnx.": "flax.nnx.", "nn.": "flax.linen.", "lax.": "jax.lax."}
_CODE = re.compile(r"(?<![`:])`([^`\n]+)`(?!`)(?=(\w?))")


def _as_rst(app, what, name, obj, options, lines):  # noqa: ARG001
    """Turns the code of a docstring, in Markdown's backticks, into links and literals."""
    arguments = inspect.signature(obj).parameters if inspect.isroutine(obj) else ()
    in_example = False

    def role(match: re.Match[str]) -> str:
        code = match[1]
        prefix = next((p for p in _PREFIXES if code.startswith(p)), "")
        target = _PREFIXES.get(prefix, "") + code[len(prefix) :]
        is_ours = re.fullmatch(r"\w+(\.\w+)?", code) and code not in arguments
        is_ours = is_ours and code.split(".")[0] in _PUBLIC
        is_linked = is_ours or target in _LINKED or code.startswith("freeze_optax.")
        text = f":py:obj:`{code} <{target}>`" if is_linked else f"``{code}``"
        return text + "\\ " * bool(match[2])  # reST wants a space after it

    for i, line in enumerate(lines):
        in_example = line.lstrip().startswith(">>>") or (in_example and bool(line.strip()))
        if not in_example:
            lines[i] = _CODE.sub(role, line)


def setup(app):
    """Registers what the settings above cannot say."""
    app.connect("autodoc-process-docstring", _as_rst, priority=400)  # before napoleon
