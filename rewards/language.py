"""Does the policy think in one language? The language consistency of DeepSeek-R1 (arXiv 2501.12948, section 2.3.2).

    score = words of the thinking in the target language / words of the thinking

Code, formulas, numbers and identifiers are no words. Each word is judged by its script and by how much more frequent it
is in the target language than in any other of its script (word frequencies: wordfreq); neighbours decide together, by
the most probable path of a two-state chain, so that a name or a word of two languages goes with its sentence. A word
that no language knows speaks slightly against the target: one is a name, a dozen in a row are not.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import regex

from rewards.base import Score, preloads
from rollout.template import Reasoning
from rollout.types import Problem

SCRIPTS: dict[str, tuple[str, ...]] = {
    "Latin": ("en", "es", "fr", "de", "it", "pt", "nl", "pl", "sv", "ro", "tr", "id", "vi"),
    "Cyrillic": ("ru", "uk", "bg", "mk"),
    "Arabic": ("ar", "fa", "ur"),
    "Devanagari": ("hi",),
    "Bengali": ("bn",),
    "Greek": ("el",),
    "Hebrew": ("he",),
    "Hangul": ("ko",),
    "Han": ("zh", "ja"),
    "Kana": ("ja",),
}
LANGUAGES = tuple(sorted({language for languages in SCRIPTS.values() for language in languages}))

# Natural logarithms of likelihood ratios, target against the rest.
FLOOR = 1e-8  # frequency of a word that is not on a list; the rarest on it has about 1e-6
CLIP = 9.0  # most that one word says
SWITCH = 3.0  # cost of going over from one language to the other between two words
UNKNOWN = -0.5  # a word on no list
# Characters that are shared: a run of Han alone is Chinese, among kana it is Japanese.
SHARED = {("zh", "Han"): 1.5, ("zh", "Kana"): -4.0, ("ja", "Han"): -0.5, ("ja", "Kana"): 4.0}
LONGEST = 64  # characters; no list holds a longer word
PROSE = 8  # so many words in a row are prose, even between the marks of code or of a formula

_NAMES_OF_FUNCTIONS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "log",
        "ln",
        "exp",
        "mod",
        "gcd",
        "lcm",
        "max",
        "min",
        "lim",
        "det",
        "arcsin",
        "arccos",
        "arctan",
    ]
)
_MARK = re.compile(r"```|`|\$\$?|\\[()\[\]]|\n")
_CLOSES = {"```": "```", "`": "`", "$$": "$$", "$": "$", r"\(": r"\)", r"\[": r"\]"}
_ONE_LINE = ("`", "$", r"\(")
_TOKEN = regex.compile(
    r"(?P<Han>\p{Han})|(?P<Kana>[\p{Hiragana}\p{Katakana}])"
    r"|(?P<word>[^\W\p{Han}\p{Hiragana}\p{Katakana}]"
    r"(?:[^\W\p{Han}\p{Hiragana}\p{Katakana}]|\p{M}|\u200c|\u200d|['’](?=\p{L}))*+)"
)
_SCRIPT = regex.compile("|".join(rf"(?P<{name}>\p{{{name}}})" for name in SCRIPTS if name not in ("Han", "Kana")))
_IDENTIFIER = re.compile(r"[\d_]|[a-z][A-Z]")
_POINTS = re.compile(r"[A-HJ-Z]|[A-Z]{2,3}")
_JOINS = re.compile(r"[\s,;.:،।、。]{0,3}")


@dataclass(frozen=True, slots=True)
class Word:
    """A word, or a single character of a script without spaces.

    Attributes:
        text: lower case.
        script: a key of SCRIPTS; empty for any other.
    """

    text: str
    script: str


@preloads("wordfreq")
def language_consistency(
    problem: Problem, reasoning: Reasoning, *, target: str = "prompt", min_words: int = 10
) -> Score:
    """Share of the words of the thinking that are in the target language, in [0, 1].

    Does not apply (None) to a thinking of fewer than ``min_words`` words: a few words beside code earn nothing.

    Metrics: ``words`` (how many were judged) and ``left_out`` (share of all words that lay in code, formulas and
    identifiers: a policy that hides its thinking there shows here).

    Args:
        target: a language of LANGUAGES, or ``prompt``: that of the problem (None where that has no words).
        min_words: >= 1. A Chinese or Japanese character counts as a word.

    Raises:
        ValueError: no such language.
    """
    if target != "prompt" and target not in LANGUAGES:
        raise ValueError(f"target must be prompt or one of {', '.join(LANGUAGES)}, got {target!r}")
    if min_words < 1:
        raise ValueError(f"min_words must be >= 1, got {min_words}")
    words, left_out = words_of(reasoning.thinking or "")
    metrics = {"words": float(len(words)), "left_out": left_out / max(1, left_out + len(words))}
    language = language_of(problem.prompt) if target == "prompt" else target
    if language is None or len(words) < min_words:
        return Score(value=None, metrics=metrics)
    if not written_in(language, "Latin"):  # names of variables, of points and of functions belong to no language
        words = [w for w in words if w.script != "Latin" or (len(w.text) > 1 and w.text not in _NAMES_OF_FUNCTIONS)]
        if len(words) < min_words:
            return Score(value=None, metrics={**metrics, "words": float(len(words))})
    return Score(value=sum(in_language(words, language)) / len(words), metrics=metrics)


def words_of(text: str) -> tuple[list[Word], int]:
    """The words of a text, and how many more lay in code, in formulas and in identifiers. Linear in the text."""
    spans = _spans(text)
    start, end = next(spans, (len(text), len(text)))
    words: list[Word] = []
    hidden: list[Word] = []
    left_out = last = 0

    def settle() -> None:
        nonlocal left_out
        if len(hidden) >= PROSE:
            words.extend(hidden)
        else:
            left_out += len(hidden)
        hidden.clear()

    for match in _TOKEN.finditer(text):
        while match.start() >= end:
            start, end = next(spans, (len(text) + 1, len(text) + 1))
        inside = start <= match.start() < end
        gap = text[last : match.start()][:8]
        if hidden and not (inside and _JOINS.fullmatch(gap)):
            settle()
        last = match.end()
        word = _word(match, gap)
        if word is None:
            left_out += any(character.isalpha() for character in match[0][:64])
        else:
            (hidden if inside else words).append(word)
    settle()
    return words, left_out


def _word(match: regex.Match[str], gap: str) -> Word | None:
    """None for what is no word: a number, an identifier, a command of LaTeX, the name of a point or a variable."""
    if match.lastgroup in ("Han", "Kana"):
        return Word(match[0], str(match.lastgroup))
    text = match[0]
    if gap.endswith("\\") or _IDENTIFIER.search(text) or _POINTS.fullmatch(text):
        return None
    script = _SCRIPT.match(text)
    return Word(text.lower().replace("’", "'"), str(script.lastgroup) if script else "")


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Code and formulas, in order. One that should end on its line and does not is none."""
    opened, begin = "", 0
    for match in _MARK.finditer(text):
        mark = match[0]
        if opened and mark == _CLOSES[opened]:
            yield begin, match.end()
            opened = ""
        elif mark == "\n" and opened in _ONE_LINE:
            opened = ""
        elif not opened and mark in _CLOSES:
            opened, begin = mark, match.start()
    if opened and opened not in _ONE_LINE:
        yield begin, len(text)


def written_in(language: str, script: str) -> bool:
    """Whether a language is written in a script."""
    return language in SCRIPTS.get(script, ())


def in_language(words: list[Word], language: str) -> list[bool]:
    """Which words are in a language: the most probable path of a chain with the states target and other."""
    known: dict[Word, float] = {word: _evidence(word, language) for word in set(words)}
    evidence = [known[word] for word in words]
    here, there, steps = 0.0, 0.0, []  # best log-likelihood of a path that ends in the target / elsewhere
    for value in evidence:
        steps.append((here >= there - SWITCH, there >= here - SWITCH))
        here, there = max(here, there - SWITCH) + value, max(there, here - SWITCH)
        if here < there - 4 * CLIP:  # only their difference counts; keeps -inf away
            here = there - 4 * CLIP
    state, path = here > there, []
    for (stays_here, stays_there), value in zip(reversed(steps), reversed(evidence), strict=True):
        path.append(state and value > -math.inf)
        state = stays_here if state else not stays_there
    return path[::-1]


def _evidence(word: Word, language: str) -> float:
    if (language, word.script) in SHARED:
        return SHARED[language, word.script]
    if not written_in(language, word.script):
        return -math.inf
    return _ratio(word.text, language, word.script)


@functools.lru_cache(maxsize=1 << 16)
def _ratio(word: str, language: str, script: str) -> float:
    """Log of a word's frequency in the language over the highest in any other language of the script."""
    if len(word) > LONGEST:
        return UNKNOWN
    own = _frequencies(language).get(word, 0.0)
    other = max((_frequencies(each).get(word, 0.0) for each in SCRIPTS[script] if each != language), default=0.0)
    if not own and not other:
        return UNKNOWN
    return max(-CLIP, min(CLIP, math.log(max(own, FLOOR) / max(other, FLOOR))))


@functools.lru_cache(maxsize=len(LANGUAGES))
def _frequencies(language: str) -> dict[str, float]:
    wordfreq: Any = __import__("wordfreq")
    return wordfreq.get_frequency_dict(language, wordlist="small")


@functools.lru_cache(maxsize=4096)
def language_of(text: str) -> str | None:
    """The language that most of a text is in; None when it holds no word of a known script."""
    words = [word for word in words_of(text)[0] if word.script]
    if not words:
        return None
    scripts = [word.script for word in words]
    script = max(SCRIPTS, key=scripts.count)
    if script in ("Han", "Kana"):
        return "ja" if scripts.count("Kana") * 5 > scripts.count("Han") else "zh"
    texts = [word.text for word in words if word.script == script]
    lists = {language: _frequencies(language) for language in SCRIPTS[script]}
    return max(lists, key=lambda language: sum(math.log(max(lists[language].get(t, FLOOR), FLOOR)) for t in texts))
