"""Parts of a data set in the names of files and folders: train, validation, test."""

import re

WORDS = {
    "train": ("train", "training", "trainset"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "testset"),
}
"""Words in names, by part."""

_CONTENT = re.compile("images?|imgs?|photos?|masks?|labels?|annotations?|annots?|instances?|gt")


def part_of(name: str) -> str | None:
    """Return the part that a relative path belongs to, by the last word that says one.

    Words that name the content are left out, so ``trainannot`` and ``instances_val2017.json``
    have a part.
    """
    for word in reversed(re.split(r"[^a-z]+", name.lower())):
        for part, words in WORDS.items():
            if word in words or _CONTENT.sub("", word) in words:
                return part
    return None
