"""Invented words, one token each: names of people, cities, universities and employers.

A word is three letters, consonant, vowel, consonant, and an ending that no other kind has, so no
word has two meanings.
"""

from ouro_jax.errors import require

CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"
ENDINGS = {
    "person": ("us", "ara", "ian", "ette"),
    "first": ("a", "an", "eth", "is"),
    "middle": ("o", "en", "or", "il"),
    "last": ("berg", "ton", "wood", "ley"),
    "city": ("ville", "port", "field", "burg"),
    "university": ("_University", "_College", "_Institute", "_Academy"),
    "employer": ("_Inc.", "_Group", "_Works", "_Partners"),
}
# Far from a divisor of the number of words, so that neighbours do not look alike.
STRIDE = 7919


def invented(kind: str, count: int, key: str) -> tuple[str, ...]:
    """The first `count` words of a kind of `ENDINGS`, always the same.

    ConfigError naming the setting `key` if there are not that many.
    """
    endings = ENDINGS[kind]
    total = len(CONSONANTS) * len(VOWELS) * len(CONSONANTS) * len(endings)
    require(1 <= count <= total, key, count, f"1 to {total:,}: no more names are known")
    words = []
    for number in range(count):
        rest, ending = divmod(number * STRIDE % total, len(endings))
        rest, last = divmod(rest, len(CONSONANTS))
        first, vowel = divmod(rest, len(VOWELS))
        start = CONSONANTS[first] + VOWELS[vowel] + CONSONANTS[last]
        words.append(start.capitalize() + endings[ending])
    return tuple(words)
