import pickle
import string
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flexjag as fj
from flexjag.algebra.masks import And, Mask, Not, Or
from flexjag.cli.language import parse_mask, parse_score
from flexjag.errors import FlexjagError, LanguageError


def same(a, b):
    """Structural equality that compares tensors by value."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (fj.Mask, fj.Score)):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize(
    ("text", "mask"),
    [
        ("full", fj.Full()),
        ("full()", fj.Full()),
        ("~full", ~fj.Full()),
        ("causal", fj.Causal()),
        ("causal(end)", fj.Causal("end")),
        ("causal(align=end)", fj.Causal("end")),
        ("window(256)", fj.Window(256, 0)),
        ("window(128, 0)", fj.Window(128, 0)),
        ("window(3, none)", fj.Window(3, None)),
        ("window(none, 2, end)", fj.Window(None, 2, "end")),
        ("window(right=2, left=1)", fj.Window(1, 2)),
        ("window(5, align=end)", fj.Window(5, 0, "end")),
        ("window(left=128, right=none, align=end)", fj.Window(128, None, "end")),
        ("window([1, 2], none)", fj.Window(torch.tensor([1, 2]), None)),
        ("prefix(4)", fj.Prefix(4)),
        ("prefix([1,2,3])", fj.Prefix(torch.tensor([1, 2, 3]))),
        ("chunked(64)", fj.Chunked(64)),
        ("global(2)", fj.GlobalTokens(2)),
        ("causal & (window(256) | prefix(4))", fj.Causal() & (fj.Window(256, 0) | fj.Prefix(4))),
        ("causal & window(256) | prefix(4)", (fj.Causal() & fj.Window(256, 0)) | fj.Prefix(4)),
        ("full | causal & ~~prefix(1)", fj.Full() | (fj.Causal() & ~~fj.Prefix(1))),
        ("~(causal | full)", ~(fj.Causal() | fj.Full())),
        ("~causal & full", (~fj.Causal()) & fj.Full()),
        ("  CAUSAL\n&\tFull ", fj.Causal() & fj.Full()),
        ("((((causal))))", fj.Causal()),
    ],
)
def test_masks_read_as_written(text, mask):
    assert same(parse_mask(text), mask), parse_mask(text)


@pytest.mark.parametrize(("name", "node"), [("window", fj.Window), ("causal", fj.Causal)])
def test_arguments_left_out_are_those_of_python(name, node):
    """One default for both: a sliding window of one number looks back."""
    given = (64,) if name == "window" else ()
    text = f"{name}({', '.join(map(str, given))})"
    assert parse_mask(text) == node(*given)
    assert repr(fj.Window(64)) == "Window(64, 0)"


def test_a_list_is_one_bound_per_segment():
    x = fj.Jagged.from_lengths(torch.zeros(9, 1, 16), [4, 5])
    dense = fj.plan(x, mask=parse_mask("prefix([1, 3])"), block_size=16).to_dense()
    assert dense.sum(1).tolist() == [1] * 4 + [3] * 5


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("", 0, ["expected a mask", "window", "the end"]),
        ("causal &", 8, ["expected a mask", "the end"]),
        ("causal & windw(3)", 9, ["unknown mask 'windw'", "did you mean 'window'", "chunked", "global"]),
        ("qqqqq", 0, ["unknown mask 'qqqqq'", "known: full, causal, window, prefix, chunked, global"]),
        ("causal and full", 7, ["expected '&', '|' or the end", "'and'", "did you mean '&'"]),
        ("not causal", 0, ["'not'", "did you mean '~'"]),
        ("!causal", 0, ["'!'", "did you mean '~'"]),
        ("causal && full", 8, ["expected a mask", "'&'"]),
        ("(causal", 7, ["expected '&', '|' or ')'", "the end"]),
        ("causal)", 6, ["expected '&', '|' or the end", "')'"]),
        ("causal(sideways)", 7, ["align", "start or end", "'sideways'"]),
        ("window", 0, ["window(left[, right[, align]])", "left is missing"]),
        ("window()", 0, ["left is missing"]),
        ("window(right=1)", 0, ["left is missing"]),
        ("window(1, 2, end, 4)", 18, ["too many arguments", "window(left[, right[, align]])"]),
        ("full(1)", 5, ["too many arguments"]),
        ("window(left=1, 2)", 15, ["name="]),
        ("window(left=1, left=2)", 15, ["'left' is given twice"]),
        ("window(1, left=2)", 10, ["'left' is given twice"]),
        ("window(size=1)", 7, ["'size' is no parameter of window"]),
        ("window(1 2)", 9, ["expected ',' or ')'", "'2'"]),
        ("prefix(none)", 7, ["n to be an integer, or a list", "'none'"]),
        ("prefix(1.5)", 7, ["n to be an integer", "'1.5'"]),
        ("prefix([1, 2.5])", 11, ["expected an integer", "'2.5'"]),
        ("prefix([])", 8, ["expected an integer", "']'"]),
        ("prefix([1", 9, ["expected ',' or ']'"]),
        ("prefix(", 7, ["expected a value", "the end"]),
        ("prefix(3000000000)", 7, ["2**31 - 1"]),
        ("prefix(1e999)", 7, ["finite"]),
        ("window(-1)", 0, ["left", "at least 0", "-1"]),
        ("chunked(0)", 0, ["size", "at least 1", "0"]),
        ("chunked([2, 0])", 8, ["size", "at least 1 everywhere"]),
        ("prefix([2, -1])", 7, ["n", "at least 0 everywhere"]),
        ("samegroup([1, 1])", 0, ["'samegroup' can only be built in Python"]),
        ("causal $ full", 7, ["'$'"]),
        ("~" * 101 + "full", 100, ["more than 100 operators"]),
        ("|".join(["causal"] * 102), 706, ["more than 100 operators"]),
        ("(" * 2000 + "causal" + ")" * 2000, 100, ["more than 100 operators"]),
    ],
)
def test_errors_point_and_say_what_was_expected(text, column, words):
    with pytest.raises(LanguageError) as caught:
        parse_mask(text)
    message = str(caught.value)
    for word in words:
        assert word in caught.value.problem
    assert caught.value.column == column
    problem, shown, caret = message.split("\n")
    assert (problem, shown) == (caught.value.problem, "  " + text)
    assert caret == " " * (2 + column) + "^"
    assert f"column {column + 1}" in caught.value.line
    assert "\n" not in caught.value.line


def test_the_caret_stands_right_under_text_of_several_lines():
    with pytest.raises(LanguageError) as caught:
        parse_mask("full\n& windw")
    assert str(caught.value).split("\n")[1:] == ["  full & windw", "         ^"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("alibi", "Alibi(<float32[4]>)"),
        ("softcap(30)", "SoftCap(30.0)"),
        ("softcap(cap=.5e1)", "SoftCap(5.0)"),
        ("alibi >> softcap(30)>>relative(8)", "Alibi(<float32[4]>) >> SoftCap(30.0) >> RelativeBias(<float32[4, 17]>)"),
        ("(alibi >> softcap(2))", "Alibi(<float32[4]>) >> SoftCap(2.0)"),
        ("relative(0)", "RelativeBias(<float32[4, 1]>)"),
    ],
)
def test_scores_read_as_written(text, shown):
    assert repr(parse_score(text, 4)) == shown


def test_a_score_is_the_same_every_time_and_does_something():
    first, again = parse_score("relative(8)", 4), parse_score("relative(8)", 4)
    assert same(first, again)
    assert bool((first.table != 0).all())
    assert same(parse_score("alibi", 8), fj.Alibi.from_heads(8))


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("alib", 0, ["unknown score 'alib'", "did you mean 'alibi'", "softcap"]),
        ("causal", 0, ["unknown score 'causal'", "alibi, softcap, relative"]),
        ("alibi & softcap(3)", 6, ["expected '>>' or the end", "'&'"]),
        ("alibi >>", 8, ["expected a score", "the end"]),
        ("(alibi", 6, ["expected '>>' or ')'"]),
        ("softcap", 0, ["softcap(cap)", "cap is missing"]),
        ("softcap(0)", 0, ["cap", "positive"]),
        ("softcap(none)", 8, ["cap to be a number"]),
        ("relative(1.5)", 9, ["max_distance to be an integer"]),
        ("relative(-3)", 0, ["max_distance", "0 to 65536", "-3"]),
        ("relative(999999)", 0, ["max_distance", "0 to 65536"]),
        ("scoremod", 0, ["can only be built in Python"]),
    ],
)
def test_score_errors(text, column, words):
    with pytest.raises(LanguageError) as caught:
        parse_score(text, 4)
    for word in words:
        assert word in caught.value.problem
    assert caught.value.column == column


numbers = st.integers(0, 2**31 - 1)
per_segment = st.lists(numbers, min_size=1, max_size=4).map(torch.tensor)
bounds = numbers | per_segment
limits = st.none() | bounds
aligns = st.sampled_from(["start", "end"])
leaves = (
    st.builds(fj.Full)
    | st.builds(fj.Causal, aligns)
    | st.builds(fj.Window, limits, limits, aligns)
    | st.builds(fj.Prefix, bounds)
    | st.builds(fj.Chunked, st.integers(1, 2**31 - 1))
    | st.builds(fj.GlobalTokens, bounds)
)
mask_trees = st.recursive(
    leaves,
    lambda inner: st.builds(And, inner, inner) | st.builds(Or, inner, inner) | st.builds(Not, inner),
    max_leaves=12,
)


def write(mask: Mask, space) -> str:
    """The mask with every operator in parentheses, so that precedence has no say; `space()` goes between tokens."""

    def value(x):
        if isinstance(x, torch.Tensor):
            return f"[{f'{space()},{space()}'.join(map(str, x.tolist()))}]"
        return "none" if x is None else str(x)

    match mask:
        case And() | Or():
            sign = "&" if isinstance(mask, And) else "|"
            return f"({space()}{write(mask.left, space)}{space()}{sign}{write(mask.right, space)})"
        case Not():
            return f"~{space()}({write(mask.mask, space)}{space()})"
    name = "global" if isinstance(mask, fj.GlobalTokens) else type(mask).__name__.lower()
    arguments = [f"{f.name}{space()}={space()}{value(getattr(mask, f.name))}" for f in fields(mask)]
    return f"{name}{space()}({','.join(arguments)})"


@given(mask_trees, st.randoms(use_true_random=False))
def test_any_mask_written_out_reads_back(mask, random):
    text = write(mask, lambda: random.choice(["", " ", "\t", "  "]))
    assert same(parse_mask(text), mask), text


names = {"full": fj.Full(), "causal": fj.Causal(), "chunked": fj.Chunked(3), "prefix": fj.Prefix(2)}
terms = st.tuples(st.sampled_from(["", "~", "~~"]), st.sampled_from(sorted(names))).map("".join)


@given(st.lists(st.tuples(st.sampled_from("&|"), terms), min_size=1, max_size=8))
def test_precedence_is_that_of_python(chain):
    text = " ".join(f"{sign} {term}" for sign, term in chain)[2:]
    ours = text.replace("chunked", "chunked(3)").replace("prefix", "prefix(2)")
    assert same(parse_mask(ours), eval(text, {}, names))


@given(mask_trees)
def test_the_printed_form_of_a_mask_without_tensors_reads_back(mask):
    text = repr(mask)
    if "<int64" in text:
        with pytest.raises(LanguageError):
            parse_mask(text)
    else:
        assert repr(parse_mask(text)) == text


words = st.sampled_from(
    ["causal", "window", "prefix", "none", "end", "left", "alibi", "softcap", "3", "-1", "1.5", "[", "]"]
)
signs = st.sampled_from(["(", ")", ",", "=", "&", "|", "~", ">>", " ", "'", '"', "$", "\n", "é"])
texts = st.lists(words | signs, max_size=12).map("".join) | st.text(string.printable, max_size=12)


@given(texts)
def test_no_text_fails_in_any_other_way(text):
    for parse, kind in ((parse_mask, fj.Mask), (lambda t: parse_score(t, 2), fj.Score)):
        try:
            got = parse(text)
        except LanguageError as error:
            got = error
        if isinstance(got, LanguageError):
            assert 0 <= got.column <= len(text)
            assert len(str(got).split("\n")) == 3
        else:
            assert isinstance(got, kind)


def test_an_error_is_a_flexjag_error_and_survives_pickling():
    error = LanguageError("causal &", 8, "expected a mask")
    assert isinstance(error, FlexjagError)
    assert isinstance(error, ValueError)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.line) == (str(error), error.line)
