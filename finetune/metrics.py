"""How near an answer is to the reference: exact match, ANLS, ROUGE-L and token F1, each from 0 to 1.

    score("Three white cakes.", "three cakes")  # exact_match 0, anls 0.61, rouge_l 0.8, token_f1 0.8

Words are told apart by blanks; in scripts that write none (Chinese, Japanese, Thai...) every character is a word. An
empty text equals an empty text and nothing else.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import regex
from rapidfuzz.distance import LCSseq, Levenshtein

ANLS_THRESHOLD = 0.5
ARTICLES = ("a", "an", "the")
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
# What str.strip and str.split take for blank, which is what a blank is here; \s of regex lacks four of them.
BLANK = r"\s\x1c-\x1f"
PIECE = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[^{BLANK}{UNSPACED}]+")
LETTERS = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}]]+", regex.V1)
IN_NUMBER = r"(?<=\d)\p{P}(?=\d)|(?<![\p{L}\p{N}])-(?=\d)"
THOUSANDS = r"(?<=\d),(?=\d{3}(?!\d))"
PUNCTUATION = regex.compile(rf"{THOUSANDS}|(?!{IN_NUMBER})[\p{{P}}$+<=>^`|~]")
DASHES = dict.fromkeys(map(ord, "\N{MINUS SIGN}\N{EN DASH}"), "-")
RESAMPLES = 2000


class Scores(NamedTuple):
    """What an answer gets, each 0 to 1."""

    exact_match: float
    """1 when the tokens are the same, see `squad_tokens`"""
    anls: float
    """normalised Levenshtein similarity of the texts, 0 where over half of the characters would have to change"""
    rouge_l: float
    """longest common subsequence of the words, as F1"""
    token_f1: float
    """tokens in common, see `squad_tokens`, as F1"""

    @property
    def mean(self) -> float:
        """Of the four, to put answers in an order."""
        return sum(self) / len(self)


METRICS = Scores._fields


def score(answer: str, reference: str) -> Scores:
    """All metrics of one answer."""
    return Scores(
        exact_match(answer, reference), anls(answer, reference), rouge_l(answer, reference), token_f1(answer, reference)
    )


def mean_scores(scores: Sequence[Scores]) -> dict[str, float]:
    """Mean of each metric, by its name.

    Raises:
        ValueError: when there are no scores.
    """
    if not scores:
        raise ValueError("there are no answers to take the mean of")
    return {name: float(np.mean(column)) for name, column in zip(METRICS, zip(*scores, strict=True), strict=True)}


def squad_tokens(text: str) -> list[str]:
    """Tokens as SQuAD's evaluation has them: lower case, without punctuation and the articles a, an, the.

    Beyond SQuAD: wide and narrow letters are the same (NFKC), and what says something stays: a point or sign of a
    number (3.5 is not 35, -5 not 5; 1,000 is 1000), and articles or marks that are all of the text (the choice "A").
    """
    text = _plain(text)
    words = PIECE.findall(PUNCTUATION.sub("", text))
    return [word for word in words if word not in ARTICLES] or words or PIECE.findall(text)


def rouge_tokens(text: str) -> list[str]:
    """Words as ROUGE has them, without stemming: lower case, runs of letters and digits of any script."""
    text = _plain(text)
    return LETTERS.findall(text) or PIECE.findall(text)


def _plain(text: str) -> str:
    """Lower case; wide and narrow letters, and the dashes that stand for a minus, are the same."""
    return unicodedata.normalize("NFKC", text).casefold().translate(DASHES)


def exact_match(answer: str, reference: str) -> float:
    """1 when both have the same `squad_tokens`, else 0."""
    return float(squad_tokens(answer) == squad_tokens(reference))


def anls(answer: str, reference: str) -> float:
    """Average normalised Levenshtein similarity, of ST-VQA and DocVQA, of one answer.

    1 - NL where NL < 0.5, else 0; NL is the number of characters to change over the length of the longer text, both
    in lower case with single blanks.
    """
    distance = Levenshtein.normalized_distance(*(" ".join(text.lower().split()) for text in (answer, reference)))
    return 1 - distance if distance < ANLS_THRESHOLD else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of the `rouge_tokens`."""
    tokens, wanted = rouge_tokens(answer), rouge_tokens(reference)
    return _f1(LCSseq.similarity(tokens, wanted), len(tokens), len(wanted))


def token_f1(answer: str, reference: str) -> float:
    """F1 of the `squad_tokens`, in any order."""
    tokens, wanted = squad_tokens(answer), squad_tokens(reference)
    return _f1((Counter(tokens) & Counter(wanted)).total(), len(tokens), len(wanted))


def _f1(common: int, given: int, wanted: int) -> float:
    """2PR / (P + R), with precision common / given and recall common / wanted."""
    if not given or not wanted:
        return float(given == wanted)
    return 2 * common / (given + wanted)


def difference_interval(differences: Sequence[float], groups: Sequence[object], seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean difference, by a bootstrap over groups.

    Args:
        differences: one for each answer.
        groups: the sample that each belongs to; answers of one conversation are drawn together.
    """
    _, places = np.unique([str(group) for group in groups], return_inverse=True)
    sums, counts = np.bincount(places, weights=differences), np.bincount(places)
    random = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES):
        drawn = random.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
