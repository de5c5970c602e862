"""Globs over key paths."""

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from freeze_optax._tree.globs import compile_glob, expand_braces
from freeze_optax._tree.key_paths import ancestors
from freeze_optax._tree.messages import few_clauses, nearest_names, printable, quoted_list
from tests.support.sampling import examples

ENCODER = [
    "encoder/layer_0/kernel",
    "encoder/layer_1/kernel",
    "encoder/layer_10/kernel",
    "encoder/norm/scale",
    "head/encoder/kernel",
    "head/kernel",
]


def selected(pattern, paths):
    regex = compile_glob(pattern)
    return [path for path in paths if regex.match(path)]


def named(pattern, nodes):
    regex = compile_glob(pattern, whole=True)
    return [node for node in nodes if regex.match(node)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("encoder/layer_1", ["encoder/layer_1/kernel"]),
        ("encoder/layer_1*", ["encoder/layer_1/kernel", "encoder/layer_10/kernel"]),
        ("encoder/layer_?", ["encoder/layer_0/kernel", "encoder/layer_1/kernel"]),
        ("encoder/layer", []),
        ("layer_1", []),
        ("encode", []),
        ("coder", []),
        ("encoder/", []),
        ("Encoder", []),
        ("encoder/*", ENCODER[:4]),
        ("*/kernel", ["head/kernel"]),
        ("*/*/kernel", [*ENCODER[:3], "head/encoder/kernel"]),
        ("*", ENCODER),
        ("*/*/*/*", []),
        ("?", []),
        ("encoder", ENCODER[:4]),
        ("head/kernel", ["head/kernel"]),
        ("head/kernel/*", []),
    ],
)
def test_pattern_matches_component_by_component(pattern, expected):
    assert selected(pattern, ENCODER) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("[abc]", ["a", "b"]),
        ("[a-b]", ["a", "b"]),
        ("[!a]", ["b", "d", "-", "]", "^"]),
        ("[^a]", ["b", "d", "-", "]", "^"]),
        ("[]]", ["]"]),
        ("[!]]", ["a", "b", "d", "-", "^"]),
        ("[a^]", ["a", "^"]),
        ("[a-]", ["a", "-"]),
        ("[-a]", ["a", "-"]),
        ("[--0]", ["-"]),
        ("[+--]", ["-"]),
        ("x[0-9]", ["x1"]),
        ("x[!0-9]", ["xy"]),
        ("[\\d]", ["d"]),
        ("[abc]]", []),
    ],
)
def test_a_class_stands_for_one_character(pattern, expected):
    assert selected(pattern, ["a", "b", "d", "-", "]", "^", "x1", "xy"]) == expected


@pytest.mark.parametrize("pattern", ["a?b", "a*b", "a[!x]b", "a[!-]b"])
def test_nothing_but_two_stars_crosses_a_slash(pattern):
    assert selected(pattern, ["a/b", "a+b"]) == ["a+b"]


STARS = ["a", "a/b", "a/b/c", "a/x/b/c", "a/x/y/b", "b", "b/a", "x/a/y"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**", STARS),
        ("**/**", STARS),
        ("**/a", ["a", "a/b", "a/b/c", "a/x/b/c", "a/x/y/b", "b/a", "x/a/y"]),
        ("**/b", ["a/b", "a/b/c", "a/x/b/c", "a/x/y/b", "b", "b/a"]),
        ("**/b/c", ["a/b/c", "a/x/b/c"]),
        ("a/**", ["a", "a/b", "a/b/c", "a/x/b/c", "a/x/y/b"]),
        ("a/**/b", ["a/b", "a/b/c", "a/x/b/c", "a/x/y/b"]),
        ("a/**/**/b", ["a/b", "a/b/c", "a/x/b/c", "a/x/y/b"]),
        ("a/**/x/**/b", ["a/x/b/c", "a/x/y/b"]),
        ("**/a/**/b/**", ["a/b", "a/b/c", "a/x/b/c", "a/x/y/b"]),
        ("**/a/*", ["a/b", "a/b/c", "a/x/b/c", "a/x/y/b", "x/a/y"]),
        ("**/*/*/*", ["a/b/c", "a/x/b/c", "a/x/y/b", "x/a/y"]),
    ],
)
def test_two_stars_stand_for_any_number_of_components_also_none(pattern, expected):
    assert selected(pattern, STARS) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a", ["a"]),
        ("*", ["a", "b"]),
        ("a/*", ["a/b"]),
        ("**/b", ["a/b", "a/x/y/b", "b"]),
        ("**/[bc]", ["a/b", "a/b/c", "a/x/b/c", "a/x/y/b", "b"]),
        ("a/**", ["a", "a/b", "a/b/c", "a/x/b/c", "a/x/y/b"]),
        ("a/**/b", ["a/b", "a/x/y/b"]),
        ("{a,a/b}", ["a", "a/b"]),
        ("**", STARS),
    ],
)
def test_a_whole_match_names_the_node_and_nothing_below(pattern, expected):
    assert named(pattern, STARS) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a", ["a"]),
        ("{a,b}", ["a", "b"]),
        ("{a}", ["a"]),
        ("x{,_old}", ["x", "x_old"]),
        ("{a,b}/{c,d}", ["a/c", "a/d", "b/c", "b/d"]),
        ("x/{a,b/{c,d}}/y", ["x/a/y", "x/b/c/y", "x/b/d/y"]),
        ("{a,{b,{c,d}}e}", ["a", "be", "ce", "de"]),
        ("{*,**/b}", ["*", "**/b"]),
        ("{0..3}", ["0", "1", "2", "3"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{8..011}", ["008", "009", "010", "011"]),
        ("{00..2}", ["00", "01", "02"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{10..08}", ["10", "09", "08"]),
        ("{4..4}", ["4"]),
        ("{0..1}{a,b}", ["0a", "0b", "1a", "1b"]),
        ("{x,{0..1}}", ["x", "0", "1"]),
        ("{a..c}", ["a..c"]),
        ("{0..2,x}", ["0..2", "x"]),
        ("[{]a[}]", ["[{]a[}]"]),
        ("{[,],b}", ["[,]", "b"]),
        ("{a,[}]}", ["a", "[}]"]),
    ],
)
def test_braces_write_out_alternatives(pattern, expected):
    assert expand_braces(pattern) == expected


def test_braces_select_the_union_of_their_alternatives():
    paths = [f"encoder/layer_{i}/kernel" for i in (0, 9, 10, 11, 12)] + ["head/kernel"]
    assert selected("{encoder/layer_{9..11},head}/kernel", paths) == [
        "encoder/layer_9/kernel",
        "encoder/layer_10/kernel",
        "encoder/layer_11/kernel",
        "head/kernel",
    ]


@pytest.mark.parametrize("char", list("*?[]{}!^.+$|()\\,-~&#"))
def test_a_bracket_makes_any_character_plain(char):
    others = [other for other in "*?[]{}!^.+$|()\\,-~&#ab" if other != char]
    # A class can't begin with its negation.
    pattern = char if char in "!^" else f"[{char}]"
    assert selected(f"x{pattern}y", [f"x{c}y" for c in [*others, char]]) == [f"x{char}y"]


def test_two_stars_in_a_bracket_are_plain():
    assert selected("a[**]", ["a*", "ab", "a"]) == ["a*"]


@pytest.mark.parametrize("char", list("!^.+$|()\\,-~&# é\n"))
def test_characters_of_regular_expressions_are_plain(char):
    assert selected(f"x{char}", [f"x{char}/w", "x/w", "xa/w", f"x{char}y/w"]) == [f"x{char}/w"]


def test_a_newline_in_a_key_is_a_character_like_any_other():
    assert selected("a?b/**/*z", ["a\nb/x\ny/z", "a\nb", "ab/z"]) == ["a\nb/x\ny/z"]
    assert named("a/b", ["a/b", "a/b\n"]) == ["a/b"]
    assert named("a/**", ["a/b\n/c"]) == ["a/b\n/c"]


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("a/[bc", r"pattern 'a/\[bc': `\[` without `\]`; write \[\[\]"),
        ("a/[b/c]", r"'a/\[b/c\]': `\[` without `\]`"),
        ("[]", r"'\[\]': `\[` without `\]`"),
        ("[!]", r"'\[!\]': `\[` without `\]`"),
        ("a/{b,c", r"pattern 'a/{b,c': `{` without `}`; write \[{\]"),
        ("a/{b,{c}", r"'a/{b,{c}': `{` without `}`"),
        ("a/b}", r"pattern 'a/b}': `}` without `{`; write \[}\]"),
        ("[a--]", r"pattern '\[a--\]': bad character range a-"),
        ("[z-a]", r"pattern '\[z-a\]': bad character range z-a"),
        ("enc**/b", r"pattern 'enc\*\*/b': `\*\*` stands for whole components.*'enc'; write `\*`"),
        ("**x", r"'\*\*x': `\*\*` stands for whole components.*'x'"),
        ("a/***", r"'a/\*\*\*': `\*\*` stands for whole components"),
    ],
)
def test_a_malformed_pattern_says_what_is_wrong_and_what_to_write(pattern, match):
    with pytest.raises(ValueError, match=match):
        compile_glob(pattern)


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("{0..10000}", r"`{0\.\.10000}` is too long a range; use `\*` or fo\.regex"),
        ("x{5..99999999999}", r"`{5\.\.99999999999}` is too long a range"),
        ("{0..99}{0..100}", r"'{0\.\.99}{0\.\.100}' stands for 10,100 globs.* 10,000; use `\*`"),
        ("{a,b}" * 40, r"stands for 1,099,511,627,776 globs"),
        ("{" + "{a,b}" * 40 + ",c}", r"stands for 1,099,511,627,776 globs"),
    ],
)
def test_too_many_alternatives_are_refused_before_they_are_written_out(pattern, match):
    with pytest.raises(ValueError, match=match):
        compile_glob(pattern)


def test_ten_thousand_alternatives_are_allowed():
    assert selected("x{0..9999}", ["x0", "x9999", "x10000", "x"]) == ["x0", "x9999"]


def reaches(pattern, path, whole):
    """Whether a glob, as components, names the path or (unless whole) a node above it."""
    if not pattern:
        return not whole or not path
    first, *rest = pattern
    if first == "**" and reaches(rest, path, whole):
        return True
    if not path:
        return False
    if first == "**":
        return reaches(pattern, path[1:], whole)
    return fnmatch.fnmatchcase(path[0], first) and reaches(rest, path[1:], whole)


names = st.text("ab", min_size=1, max_size=3)
pieces = st.sampled_from(["a", "b", "*", "?", "[a]", "[ab]", "[!a]"])
globs = st.lists(pieces, min_size=1, max_size=3).map("".join).filter(lambda glob: "**" not in glob)
components = st.one_of(st.just("**"), st.just("**"), globs)


@examples(1500)
@given(
    st.lists(components, min_size=1, max_size=5),
    st.lists(names, min_size=1, max_size=6),
    st.booleans(),
)
def test_a_glob_agrees_with_a_matcher_that_tries_everything(pattern, path, whole):
    regex = compile_glob("/".join(pattern), whole=whole)
    assert (regex.match("/".join(path)) is not None) == reaches(pattern, path, whole)


def test_several_double_stars_finish_on_a_path_of_a_thousand_components():
    deep = "/".join(["a"] * 1000)
    patterns = ["**/a/**/a/**/a/**/a/**/b", "a/**/a/**/*a*/**/?/**/b", "**/a/a/**/a/a/**/a/b"]
    assert [pattern for pattern in patterns if compile_glob(pattern).match(deep)] == []
    assert [p for p in patterns if compile_glob(p).match(deep + "/b/c")] == patterns


def test_several_double_stars_name_a_node_below_a_thousand_others():
    deep = "/".join(["a"] * 1000)
    assert named("**/a/**/a/**/b", [deep, deep + "/b"]) == [deep + "/b"]


def test_ancestors_go_from_the_path_up_without_the_root():
    assert list(ancestors("a/b/c")) == ["a/b/c", "a/b", "a"]
    assert list(ancestors("a")) == ["a"]
    assert list(ancestors("")) == []


@pytest.mark.parametrize(
    ("text", "paths", "expected"),
    [
        ("encodr", ["x", "encoder", "y"], "nearest: 'encoder'"),
        ("layer_1", ["layer_0", "layer_2"], "nearest: 'layer_2', 'layer_0'"),
        ("ab", ["ab1", "ab2", "ab3", "ab4"], "nearest: 'ab4', 'ab3', 'ab2'"),
        ("zzz", ["a", "b"], "the tree has 'a', 'b'"),
        ("zzz", list("abcdefg"), "the tree has 'a', 'b', 'c', 'd', 'e' and 2 more"),
        ("zzz", ["a", "a"], "the tree has 'a'"),
        ("zzz", [], "the tree has no leaves"),
    ],
)
def test_nearest_names_the_paths_most_like_the_text(text, paths, expected):
    assert nearest_names(text, paths) == expected


def test_nearest_gives_no_more_than_asked_for():
    assert nearest_names("layer", [f"layer{i}" for i in range(9)], 2).count("layer") == 2


def test_listed_counts_the_names_it_leaves_out():
    assert quoted_list(["a"]) == "'a'"
    assert quoted_list("abc", 2) == "'a', 'b' and 1 more"
    assert quoted_list("abc", 3) == "'a', 'b', 'c'"
    assert quoted_list(map(str, range(2005))) == "'0', '1', '2', '3', '4' and 2,000 more"


@pytest.mark.parametrize("stars", [12, 40])
def test_many_stars_in_a_component_take_no_exponential_time(stars):
    # With each star free to take back what it took, 12 take minutes and 40 an age.
    path = "a" * 60
    assert not compile_glob("*a" * stars + "b").match(path)
    assert compile_glob("*a" * stars).match(path)
    assert not compile_glob("*a" * 61).match(path)


@examples(300)
@given(st.text("ab*?", max_size=9).filter(lambda glob: "**" not in glob), st.text("ab", max_size=8))
def test_stars_in_a_component_match_as_fnmatch_has_it(glob, text):
    matched = compile_glob(glob, whole=True).match(text) is not None
    assert matched == fnmatch.fnmatchcase(text, glob)


def test_stars_for_components_at_the_end_are_the_node_and_all_below_it_and_nothing_beside():
    regex = compile_glob("a/**", whole=True)
    assert [path for path in ("a", "a/b", "a/b/c", "ab", "ab/c") if regex.match(path)] == [
        *("a", "a/b", "a/b/c")
    ]


@pytest.mark.parametrize(
    ("clauses", "shown"),
    [([], ""), (["a", "b", "c"], "a; b; c"), (list("abcd"), "a; b; c; and 1 more")],
)
def test_some_clauses_are_shown_and_the_others_counted(clauses, shown):
    assert few_clauses(clauses) == shown


def test_printable_writes_out_what_commands_a_terminal_and_nothing_else():
    assert printable("layer_0/kernel \N{LATIN SMALL LETTER E WITH ACUTE}中") == "layer_0/kernel é中"
    assert printable("a\x1b[2Jb\nc\x00\u202e") == r"a\x1b[2Jb\nc\x00\u202e"


def test_braces_are_nested_200_deep_and_no_deeper():
    assert expand_braces("{" * 200 + "a" + "}" * 200) == ["a"]
    with pytest.raises(ValueError, match="braces are nested more than 200 deep"):
        expand_braces("{" * 201 + "a" + "}" * 201)


def test_the_numbers_of_a_range_have_100_digits_at_most():
    zeros = "0" * 99
    assert expand_braces(f"{{{zeros}1..{zeros}2}}") == [f"{zeros}1", f"{zeros}2"]
    with pytest.raises(ValueError, match="is too long a range"):
        expand_braces(f"{{0{zeros}1..0{zeros}2}}")
