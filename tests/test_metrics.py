"""The metrics against values by hand, the published definitions and examples, and what holds for any text."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.metrics import (
    METRICS,
    Scores,
    anls,
    difference_interval,
    exact_match,
    mean_scores,
    rouge_l,
    rouge_tokens,
    score,
    squad_tokens,
    token_f1,
)

WORDS = st.lists(st.sampled_from("the a An cake, Cakes; on 'white plate. it's don't B!".split()), max_size=8).map(
    " ".join
)
TEXTS = st.one_of(WORDS, st.text(max_size=20), st.text("图中有红色。 aA3.,-", max_size=12))


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("The cake.", "cake", True),
        ("  A\tCAKE! ", "an cake", True),
        ("cakes", "cake", False),
        ("cake plate", "plate cake", False),
        ("", "", True),
        ("", "cake", False),
        ("cake", "", False),
        # SQuAD would find all of these equal
        ("3.5", "35", False),
        ("-5", "5", False),
        ("\u22125", "-5", True),
        ("\u20135", "5", False),
        ("A", "The", False),
        ("A", "B", False),
        ("A.", "a", True),
        ("+", "-", False),
        ("...", "", False),
        # numbers
        ("1,000", "1000", True),
        ("1,5", "15", False),
        ("10:30.", "10:30", True),
        ("$5", "5", True),
        # Chinese, wide characters, blanks between them
        ("红色。", "红色", True),
        ("红 色", "红色", True),
        ("红色", "蓝色", False),
        ("ＡＢＣ １２", "abc 12", True),
    ],
)
def test_exact_match(answer, reference, same):
    assert exact_match(answer, reference) == exact_match(reference, answer) == same


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("abcd", "abcd", 1),
        ("ABCD", "abcd", 1),
        ("abcx", "abcd", 0.75),
        ("abxx", "abcd", 0),  # half changed: not below the threshold
        ("abcxx", "abcde", 0.6),
        ("a  cake", "a cake", 1),
        ("cake", "cakes", 0.8),
        ("图中有红色", "图中有蓝色", 0.8),
        ("", "", 1),
        ("", "abcd", 0),
        ("abcd", "", 0),
    ],
)
def test_anls(answer, reference, expected):
    assert anls(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        # Lin 2004, section 3.1: with equal weights 3/4 and 2/4
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("the gunman police killed", "police killed the gunman", 2 / 4),
        ("three cakes", "There are three cakes on it.", 2 * 2 / (2 + 6)),
        ("图中有红色", "图中有蓝色的", 2 * 4 / (5 + 6)),
        ("ABC图", "abc 图", 1),
        ("नमस्ते दुनिया", "नमस्ते", 2 / 3),  # vowel signs do not end a word
        ("", "", 1),
        ("", "cake", 0),
        ("cake", "", 0),
        ("!", "!", 1),
        ("!", "", 0),
        ("+", "-", 0),
    ],
)
def test_rouge_l(answer, reference, expected):
    assert rouge_l(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the white plate", "white plate", 1),
        ("plate white", "white plate", 1),
        ("white white", "white plate", 0.5),
        ("three cakes", "There are three cakes on it.", 2 * 2 / (2 + 6)),
        ("红色", "红的", 0.5),
        ("", "", 1),
        ("", "cake", 0),
        ("cake", "", 0),
    ],
)
def test_token_f1(answer, reference, expected):
    assert token_f1(answer, reference) == pytest.approx(expected)


def squad_normal(text: str) -> str:
    """`normalize_answer` as SQuAD 1.1 defines it."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@given(WORDS, WORDS)
def test_english_is_scored_as_by_squad(answer, reference):
    given_, wanted = squad_normal(answer).split(), squad_normal(reference).split()
    if not given_ or not wanted:  # articles alone, which count here
        return
    assert squad_tokens(answer) == given_
    assert exact_match(answer, reference) == (given_ == wanted)
    common = sum((Counter(given_) & Counter(wanted)).values())
    expected = 2 * common / (len(given_) + len(wanted))
    assert token_f1(answer, reference) == pytest.approx(expected)


@given(st.text(string.ascii_letters + string.digits + string.punctuation + " ", max_size=30))
def test_english_words_are_those_of_rouge(text):
    words = re.sub(r"[^a-z0-9]+", " ", text.lower()).split()  # as Google's rouge-score takes them
    assert rouge_tokens(text) == (words or text.lower().split())


@given(TEXTS, TEXTS)
def test_all_lie_between_0_and_1_and_are_symmetric(answer, reference):
    scores = score(answer, reference)
    assert all(0 <= value <= 1 for value in scores)
    assert scores == score(reference, answer)
    if scores.exact_match:
        assert scores.token_f1 == 1
    if rouge_tokens(answer) == rouge_tokens(reference):
        assert scores.rouge_l == 1


def test_all_metrics_have_the_same_blanks():
    """Those of str.strip, which also takes \\x1c to \\x1f."""
    for character in map(chr, range(0x10000)):  # there are no blanks behind these
        plain = unicodedata.normalize("NFKC", character)
        if character.isspace() or not plain.strip() or regex.fullmatch(r"\s+", plain):
            assert score(character, "") == score(f" {character}\t", "") == Scores(*4 * [float(not character.strip())])
            assert score(f"two{character}words", "two words") == Scores(1, 1, 1, 1)


@given(TEXTS)
@example("\x1f")
def test_a_text_is_like_itself(text):
    assert score(text, text) == Scores(1, 1, 1, 1)
    blank = not text.strip()
    assert all(value == blank for value in score(text, ""))


def test_means():
    means = mean_scores([Scores(1, 1, 1, 1), Scores(0, 0.5, 0.25, 0)])
    assert means == {"exact_match": 0.5, "anls": 0.75, "rouge_l": 0.625, "token_f1": 0.5} and tuple(means) == METRICS
    with pytest.raises(ValueError, match="no answers"):
        mean_scores([])


def test_interval_of_a_difference():
    low, high = difference_interval([1, 0] * 200, range(400))
    assert 0.44 < low < 0.47 and 0.53 < high < 0.56  # 0.5 +- 1.96 * 0.5 / 20
    assert difference_interval([0.25] * 9, range(9)) == (0.25, 0.25)
    wide = difference_interval([1] * 50 + [0] * 50, [n // 50 for n in range(100)])  # two conversations, no more
    assert wide == (0, 1)
