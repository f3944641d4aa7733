"""A text in the place of Python's manual, so that what tests train on does not change with the version of Python.

tests/conftest.py puts it before the standard library, in this process and in those that it starts.
"""

from __future__ import annotations

import random

LETTERS = "eeeeeeeetttttaaaaooooiiiinnnnsssshhhrrrdddllcuumwfgypbvk"


def drawn_topics(number: int = 72, paragraphs: int = 9) -> dict[str, str]:
    """Return topics by name, as `pydoc_data.topics` has them: sentences of words that were drawn once, rare and common ones.

    Only random.random is used, whose numbers Python promises never to change.
    """
    draw = random.Random(20).random

    def below(n: int) -> int:
        return int(draw() * n)

    words = ["".join(LETTERS[below(len(LETTERS))] for _ in range(2 + below(4) + below(4))) for _ in range(500)]

    def sentence() -> str:
        text = " ".join(words[int(len(words) * draw() ** 3)] for _ in range(5 + below(9)))  # the first are common
        return text.capitalize() + "."

    def paragraph() -> str:
        return "\n".join(" ".join(sentence() for _ in range(1 + below(2))) for _ in range(2 + below(5)))

    return {f"{words[i]}{i}": "\n\n".join(paragraph() for _ in range(paragraphs)) + "\n" for i in range(number)}


topics = drawn_topics()
