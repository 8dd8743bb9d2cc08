"""The scores of the kit, against cases counted by hand. Which formulas look the same, test_latex.py tests."""

import math

import pytest
from rapidfuzz.distance import Levenshtein

from qwen_vl_kit import report_page, scores


def reading(truth, text, cut=False):
    """A reading as the script writes it."""
    truth, read = ("".join(latex.split()) for latex in (truth, text))
    return {"text": text, "cut": cut, "errors": Levenshtein.distance(truth, read), "length": len(truth)}


def corpus(*pairs):
    """Predictions of which the readings before are empty and those after are the second of each pair."""
    return [
        {"truth": truth, "before": reading(truth, "", cut=True), "after": reading(truth, text)} for truth, text in pairs
    ]


def after(*pairs):
    return scores.score(corpus(*pairs), seed=1)[1]


def test_scores_counted_by_hand():
    assert after(("a b", "a b")) == {
        "cer": 0, "normalized_cer": 0, "bleu": pytest.approx(1), "exact_match": 1, "formula_match": 1, "is_latex": 1,
        "cut": 0
    }  # fmt: skip
    # 1 of 3 and 2 of 5 characters: 3 of 8.
    assert after(("abc", "abd"), ("a b c d e", "abc"))["cer"] == 3 / 8
    assert after(("x", "x"), ("x", "y"), (r"x ^ 2 _ 1", "x_1^2"), ("x", "{x"))["formula_match"] == 2 / 4
    assert after(("x", "x"), ("x", "y"), (r"x ^ 2 _ 1", "x_1^2"), ("x", "{x"))["exact_match"] == 1 / 4
    assert after(("x", "x"), ("x", "{x"), ("x", r"\frac"), ("x", ""))["is_latex"] == 1 / 4
    # All runs agree, but one of five tokens is missing: only the brevity penalty.
    assert after(("a b c d e", "abcd"))["bleu"] == pytest.approx(math.exp(1 - 5 / 4))
    # 4 of 5 tokens, 3 of 4 pairs, 2 of 3 triples and 1 of 2 runs of four; a command is one token.
    assert after((r"a b c d \alpha", r"abcd\beta"))["bleu"] == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4))
    predictions = corpus(("x", "x"), ("x", "x"))
    predictions[0]["after"]["cut"] = True
    assert scores.score(predictions, seed=1)[1]["cut"] == 1 / 2


def test_tokens_are_compared():
    """Without their spaces these are the same characters."""
    for truth, text in ((r"\alpha x", r"\alphax"), (r"a \ x i", r"a \xi")):
        assert after((truth, text))["cer"] == 0, "the published figure"
        scored = after((truth, text))
        assert scored["exact_match"] == scored["formula_match"] == 0 and scored["normalized_cer"] > 0


def test_delimiters_and_unicode_forms_are_no_errors():
    for truth, text in (("x", "$x$"), (r"\[ x \]", "$$x$$"), ("caf\u00e9", "cafe\u0301")):
        scored = after((truth, text))
        assert scored["exact_match"] == scored["formula_match"] == scored["is_latex"] == 1
        assert scored["bleu"] == pytest.approx(1)
        assert scored["cer"] > 0 == scored["normalized_cer"]


def test_cer_with_spelling_aside():
    assert after((r"\left( x \right)", "(x)"))["normalized_cer"] == 0
    # 1 of the 12 characters of `\frac {1}{2}`, and none of spelling.
    scored = after((r"\frac 1 2", r"{ \frac { 1 } { 3 } }"))
    assert scored["normalized_cer"] == 1 / 12 and scored["cer"] > 4 / 12
    # What is not LaTeX is compared as it is.
    assert after(("x", "{x"))["normalized_cer"] == 1
    assert 0 < after((r"\alpha", r"\beta"))["normalized_cer"] < 1


def test_what_the_difference_means_is_said():
    spelled = corpus((r"\left( x \right)", "(x)"), ("x", "y"), ("x", "x"))
    scored = scores.score(spelled, seed=1)[1]
    # 11 of 16 characters; of 1 more it can't be told.
    assert scores.remarks(spelled, trained=True) == [
        "1 reading that looks right is spelled otherwise, which is 0.688 of the CER after training."
    ]
    assert scored["cer"] == 12 / 16
    wrong = corpus(("x", "y"), ("x", "x"))
    said = "Each reading that looks right is also spelled like the truth."
    scores.score(wrong, seed=1)
    assert scores.remarks(wrong) == [said]
    tokens = corpus(("x", "$x$"), ("x", "x"), (r"\alpha x", r"\alphax"), ("x", "y"))
    scores.score(tokens, seed=1)
    said = scores.remarks(tokens, trained=True)
    assert said[1] == (
        "Exact match compares LaTeX tokens, without $...$ around a formula; by characters without spaces, as said "
        "right after training, it is 50.0%."
    )


@pytest.mark.parametrize("text", ["{x", r"\frac", r"\left( x", "{" * 5000 + "}" * 5000, r"\hat" * 5000, ""])
def test_what_is_not_latex_is_not_drawn(text):
    assert report_page.drawing(text) is None and after(("x", text))["is_latex"] == 0


def test_drawings_have_no_delimiters():
    assert report_page.drawing("$x$") == report_page.drawing("x") is not None


def test_the_script_s_own_count_is_what_counts():
    """CER is computed once, by the script."""
    (row,) = predictions = corpus(("abcd", "abcx"))
    row["after"] |= {"errors": 0, "length": 8}
    scored = scores.score(predictions, seed=1)[1]
    assert scored["cer"] == 0 and scored["normalized_cer"] == 1 / 4
    assert not row["after"]["exact_match"] and not row["after"]["formula_match"]


def test_intervals_say_what_the_rows_can_show():
    # Half of 400 rows are put right: by the normal approximation the interval is 0.5 +- 1.96 * sqrt(0.25 / 400).
    half = corpus(*[("x", "x"), ("x", "y")] * 200)
    difference = scores.score(half, seed=1)[2]["exact_match"]
    assert difference["value"] == 0.5
    assert difference["interval"] == pytest.approx([0.5 - 0.049, 0.5 + 0.049], abs=0.001)
    assert scores.score(half, seed=1)[2]["exact_match"] == difference, "not decided by the seed"
    assert scores.verdict("exact_match", difference) == "better"
    assert scores.verdict("cer", {"interval": [0.1, 0.2]}) == "worse"
    assert scores.verdict("cer", {"interval": [-0.1, 0.2]}) == "no clear change"


def test_marks_are_on_what_differs():
    assert report_page.marked("a + b", "a - b") == [
        ["a ", False], ["+", True], [" b", False]
    ]  # fmt: skip
    assert report_page.marked("x _ 1", "x_1") == [["x _ 1", False]]
    assert report_page.marked("", "x") == []
    assert (
        "".join(piece for piece, _ in report_page.marked(r"\frac { a } { b }", r"\frac{a}{c}")) == r"\frac { a } { b }"
    )
