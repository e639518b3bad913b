"""Numbers with their units and plain words, read exactly: `-$18`, `12 345 km/h`, `2 1/4 hours`, `9 chickens`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

Phrase = tuple[Fraction | str, ...]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MATH_NAMES = _words(
    "sqrt sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp abs min max gcd lcm mod det inf infty "
    "infinity pi alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi psi omega "
    "matrix pmatrix bmatrix Bmatrix"
)
_UNITS = _words(
    "m g l L s h A V W C F th st nd rd am pm km cm mm dm kg mg ml mL dl cl lb lbs oz ft in yd mi sq hr hrs min sec "
    "a.m p.m BC mph kph MB GB TB Mb Gb kW kWh"
)
_SHORT_WORDS = _words("ad am an as at be by do go he if in is it me mr ms my no of on or so to tv up us we")
_UNSAID = frozenset({"an", "the", "and"})  # make no difference between two phrases

# What only formats: `\text{...}`, `\boxed{...}`, `\,` and `{,}` in digit groups, dollar signs of mathematics and money
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|[mf]box|boxed)\s*"
    r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
)
_FORMATTING = [
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\!|`|(?<![\w)])\*\*|\*\*(?![\w(])"), ""),
    (re.compile(r"(?<!\\)\\(?:[,;: ()\[\]]|q?quad(?![A-Za-z]))|~|\\?[$€£¥₹₩₽₺฿¢]"), " "),
    (re.compile(r"\\([%#&])"), r"\1"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})"), "°"),
    (re.compile(r"\band a half\b"), "½"),
]
_VULGAR_FRACTION = re.compile("[¼-¾⅐-⅞]")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([0-9]+)\}|([0-9]))\s*(?:\{([0-9]+)\}|([0-9]))")

_NO_PROSE = _MATH_NAMES | {"and", "minus", "negative"}  # which say something of the number
_WORD = rf"(?!(?:{'|'.join(sorted(_NO_PROSE))})\b)[^\W\d_]"
_PROSE = re.compile(r"(?<![^\W\d_])(?<!\\)[^\W\d_]{3,}")
_SAID = rf"(?:{_WORD}{{2,}},?\s)"
_WORDS_BEFORE = re.compile(rf"{_SAID}*(?:is\s|{_WORD}{{3,}}:\s)|{_SAID}{{2,}}(?![-+*/^_=])")
_UNIT = rf"(?:{_WORD}{{3,}}|(?:{'|'.join(sorted(unit for unit in _UNITS if len(unit) > 1))})\b)"
_WORDS_AFTER = re.compile(rf"(?:\s{_UNIT}(?:/{_UNIT}|/[hs]\b)?(?:\s?\^[23]|[²³])?)+\s?[.,;!]?$")
_AFTER_WORD = re.compile(r"[^\W\d_],?\s$")
_SEVERAL = re.compile(r"[,;]\s|\b(?:and|or)\b")

_TOKEN = re.compile(
    r"(?:(?P<minus>(?<!\w)-|\b(?:minus|negative)\b)\s*)?(?<![\w.^])"
    r"(?:(?:(?P<whole>[0-9]+)\s)?(?P<top>[1-9][0-9]*)/(?P<bottom>[1-9][0-9]*)(?![0-9/]|\.[0-9])"
    r"|(?P<decimal>(?:[1-9][0-9]{0,2}(?:(?P<comma>[ ,'])[0-9]{3})(?:(?P=comma)[0-9]{3})*(?!(?P=comma)?[0-9])|[0-9]+)"
    r"(?:\.[0-9]*)?|\.[0-9]+)(?::00)?)"
    r"|(?P<skip>[\s.,;:?'’\"“”°()#&—]+|(?<![0-9])!|(?<=[^\W\d_]\s)/(?=\s[^\W\d_]{3})|\ba(?=\s[^\W\d_]{2}))"
    r"|(?P<percent>%|per ?cent\b)"
    r"|(?P<word>[/-]?[^\W\d_²³]+(?:[-'’./&][^\W\d_²³]+)*)(?P<power>[23²³]|\s?\^(?:[23]|\{[23]\}))?(?![\w^])"
    r"|(?P<other>.)",
    re.IGNORECASE,
)


def without_formatting(text: str) -> str:
    """The text without formatting commands and dollar signs; of prose with one equation only what it is equal to."""
    count = 1
    while count:
        text, count = _WRAPPER.subn(r" \1 ", text)
    for pattern, replacement in _FORMATTING:
        text = pattern.sub(replacement, text)
    if has_prose(text) and not _SEVERAL.search(text):
        text = text.rpartition("=")[2]
    return " ".join(text.split())


def without_words_around(text: str) -> str:
    """The text without words before and after it: of `so we get x+1 apples` the `x+1`."""
    match = _WORDS_BEFORE.match(text)
    return _WORDS_AFTER.sub("", text[match.end() :] if match else text).rstrip(" .,;")


def has_prose(text: str, min_letters: int = 3) -> bool:
    """Whether a word of so many letters stands in the text; names of functions and Greek letters are none."""
    return any(len(word) >= min_letters and word not in _NO_PROSE for word in _PROSE.findall(text))


def read_phrase(text: str) -> Phrase | None:
    """
    The numbers and words of a text without formatting, in order; "%" stands for percent.

    Returns:
        `None` if the text holds anything else, or several numbers without words: a list, a pair or an interval.
    """
    text = _VULGAR_FRACTION.sub(lambda match: f" {unicodedata.normalize('NFKC', match[0])} ", text)
    text = _LATEX_FRACTION.sub(r" \1\2/\3\4 ", text.replace("\u2044", "/"))
    tokens = list(_tokens(" ".join(text.split())))
    phrase = tuple(token for token in tokens if token is not None)
    words = {token for token in phrase if isinstance(token, str)} - {"or", "%"}
    if len(phrase) < len(tokens) or (not words and len(numbers_of(phrase)) != 1):
        return None
    return phrase


def same_phrase(gold: Phrase, answer: Phrase) -> bool:
    """
    Whether two phrases say the same.

    With one number in each, the numbers decide, whatever their units. Otherwise all numbers and words must agree, in
    order; words without numbers may come before: `the capital is Paris`.
    """
    said = answer[-len(gold) :]
    if gold == said and (gold == answer or (answer[-len(gold) - 1] == "is" and not numbers_of(answer[: -len(gold)]))):
        return True
    pair = [*numbers_of(gold), *numbers_of(answer)]
    if len(pair) != 2 or len(numbers_of(gold)) != 1:
        return False
    if ("%" in gold) == ("%" in answer):
        return _same_number(*pair)
    percent, number = pair if "%" in gold else reversed(pair)
    return _same_number(percent, number) or (number.denominator > 1 and _same_number(percent / 100, number))


def numbers_of(phrase: Phrase) -> list[Fraction]:
    """The numbers of a phrase, in order."""
    return [token for token in phrase if isinstance(token, Fraction)]


def _same_number(a: Fraction, b: Fraction) -> bool:
    """Exactly equal; a fraction without finite decimals is also equal to the six decimals that it rounds to."""
    return a == b or (_has_finite_decimals(a) != _has_finite_decimals(b) and round(a, 6) == round(b, 6))


def _has_finite_decimals(number: Fraction) -> bool:
    return pow(10, number.denominator.bit_length(), number.denominator) == 0


def _tokens(text: str) -> Iterator[Fraction | str | None]:
    """The tokens of a phrase; `None` for what belongs to none."""
    number_end: int | None = None
    for match in _TOKEN.finditer(text):
        before = None if number_end is None else text[number_end : match.start()]
        if match["decimal"] or match["bottom"]:
            # Numbers side by side are neither one number nor a product
            yield _number(match) if before is None or before.strip() else None
            number_end = match.end()
        elif match["percent"]:
            yield "%"
        elif match["word"] and match["word"].casefold() not in _UNSAID:
            yield match[0].casefold() if _is_word(match, before) else None
        elif match["other"]:
            yield None


def _number(match: re.Match[str]) -> Fraction | None:
    if match["decimal"]:
        number = Fraction(re.sub("[ ,']", "", match["decimal"]).rstrip("."))
    else:
        number = Fraction(int(match["top"]), int(match["bottom"]))
        if match["whole"] and number >= 1:  # "3 5/2" is no mixed number
            return None
        number += int(match["whole"] or 0)
    return -number if match["minus"] else number


def _is_word(match: re.Match[str], before: str | None) -> bool:
    """Whether letters are a word or a unit, not variables; `before` stands between the last number and them."""
    word: str = match["word"]
    joined = word[0] in "/-"
    parts = re.split("[-'’./&]", word[joined:])
    longest = max(map(len, parts))
    follows = before is not None and not before.strip()
    if (word in _UNITS or _UNITS.issuperset(parts)) and (longest > 1 or (follows and not joined)):
        return True
    if word in _MATH_NAMES:
        return False
    if match["power"] or (before == "" and not joined):  # `3xyz` is no word
        return longest >= 5
    named = word.isupper() and _AFTER_WORD.search(match.string, 0, match.start()) is not None  # `plan B`
    return longest >= 3 or parts[0].lower() in _SHORT_WORDS or "&" in word or named
