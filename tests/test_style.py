"""Prose and names follow the project's rules of style: no phrase or name that they replace."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FILES = sorted(
    path
    for pattern in (
        *("segkit/**/*.py", "*.py", "tests/**/*.py", "benchmarks/*.py"),
        *("docs/**/*.md", "*.md", "benchmarks/results/*.md"),
    )
    for path in ROOT.glob(pattern)
    if path.name != Path(__file__).name  # which lists the phrases
)

PHRASES = (
    "alike",
    "and beside it",
    "asks the objects",
    "by heart",
    "cannot be meant",
    "dearer",
    "fresh",
    "in one valley",
    "in different valleys",
    "is asked for within",
    "empty, no text",
    "stands twice",
    "told apart",
    "weigh",
    "weighs",
    "what norms take",
    "who looks on",
    "worth holding",
)
"""Phrases for which there is a standard term or a plainer sentence."""

NOUNS = (
    "argument|axis|band|batch|block|box|branch|byte|call|cell|channel|checkpoint|class|column|core|"
    "crop|device|dimension|element|entry|epoch|evaluation|failure|field|figure|file|fold|folder|"
    "frame|group|image|index|ingredient|iteration|key|label|layer|level|line|list|machine|map|mask|"
    "model|module|name|node|object|operation|option|output|pair|parameter|part|path|photograph|"
    "picture|pixel|plane|point|process|question|rank|record|region|row|run|sample|scale|score|seed|"
    "setting|side|size|source|split|stage|step|table|task|tensor|test|thread|tile|token|value|view|"
    "weight|window|word|worker"
)

PLURALS = (
    "bytes|channels|classes|epochs|images|kernels|lines|masks|parameters|pixels|tensors|values"
)

PER = rf"(?:one|two|its own|{PLURALS}|an? (?:[\w-]+ )?(?:{NOUNS})) an? (?:{NOUNS})"
"""Phrases such as "one a class", in place of "one per class"."""

FAULTS = re.compile(
    rf"(?<![\w-])(?:{'|'.join((*PHRASES, PER))})(?![\w-])".replace(" ", r"(?: +|\n[ #]*)"),
    re.IGNORECASE,
)

OPENINGS = ("What", "Whether", "Who", "How")

NAMES = ("one", "found")


def faults(path: Path) -> Iterator[str]:
    """Yield each fault of a file with its line."""
    text = path.read_text()
    for match in FAULTS.finditer(text):
        yield f"line {text.count(chr(10), 0, match.start()) + 1}: {' '.join(match[0].split())!r}"
    if path.suffix == ".py":
        yield from faults_of_code(ast.parse(text))


def faults_of_code(tree: ast.Module) -> Iterator[str]:
    """Yield names that say nothing, and docstrings that open like an indirect question."""
    for node in ast.walk(tree):
        name = None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        if name in NAMES:
            yield f"line {node.lineno}: the name {name!r}"
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0] in OPENINGS:
                yield f"{getattr(node, 'name', 'the module')}: a docstring opens with {words[0]!r}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_follow_the_rules_of_style(path: Path) -> None:
    listed = list(faults(path))
    assert not listed, "\n".join(listed)


@pytest.mark.parametrize(
    ("faulty", "clean"),
    [
        ("one = 1", "first = 1"),
        ("def f(found): pass", "def f(paths): pass"),
        ("for one in x: pass", "for image in x: pass"),
        ('def f():\n    """Whether x is even."""', 'def f():\n    """Return whether x is even."""'),
        ("# one a class", "# one per class"),
        ("# a row an operation, bytes a pixel", "# a row per operation, bytes per pixel"),
        ("# a class name\n# a line", "# a class name\n# per line"),
        ("# they are told\n# apart", "# they differ significantly"),
        ("x = 1  # Weigh the views", "x = 1  # weights of the views, --weigh-views"),
    ],
)
def test_faults_are_detected(tmp_path: Path, faulty: str, clean: str) -> None:
    path = tmp_path / "example.py"
    path.write_text(faulty)
    assert list(faults(path))
    path.write_text(clean)
    assert not list(faults(path))
