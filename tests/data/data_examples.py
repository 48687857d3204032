"""Texts and files for the tests of this folder."""

import json
import random

WORDS = "the a cat dog sees finds small large red blue house river and then under over slowly never walks".split()


def story(number: int, num_words: int = 40) -> str:
    """A text that no other number gives."""
    draw = random.Random(number)
    words = [draw.choice(WORDS) for _ in range(num_words)]
    return f"Story {number}.\n" + "\n".join(" ".join(words[i : i + 8]) for i in range(0, num_words, 8)) + "\n"


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
