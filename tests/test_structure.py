"""The shape of the code itself: who imports whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "segkit"

LAYERS = ["core", "augment", "data", "models", "training", "inference", "report", "commands"]
"""The packages from the bottom up; a file imports its own package or lower ones."""

MODEL_LAYERS = [
    {"kernels"},
    {"layers"},
    {"queries", "transformer"},
    {"backbones", "decoders"},
    {"pretrained"},
    {"segmenter"},
    {"lora"},
]
"""The order within ``segkit.models``; ``export`` stands alone.

``queries`` is what mask transformers, their loss and the segmenter agree on; ``transformer`` has
the blocks of Vision Transformers, some of which are in the decoder ``eomt``.
"""

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

OPTIONAL = {"tensorboard", "torch.utils.tensorboard", "wandb", "onnx"}


def model_layer(name: str) -> int:
    return next((i for i, names in enumerate(MODEL_LAYERS) if name in names), -1)


def imports(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    package, *inner = path.relative_to(PACKAGE).with_suffix("").parts
    if package not in LAYERS:
        assert package in {"train", "infer", "__main__"}  # on top of everything
        return
    for name in imports(ast.parse(path.read_text())):
        if not name.startswith("segkit."):
            continue
        _, target, *rest = name.split(".")
        assert target in LAYERS, f"{path.name} imports {name}, which stands above all packages"
        assert LAYERS.index(target) <= LAYERS.index(package), f"{path.name} imports {name}"
        if package == target == "models" and inner[0] != rest[0] and inner[0] != "export":
            assert model_layer(rest[0]) < model_layer(inner[0]), f"{path.name} imports {name}"
        if package == "models" and inner[0] == "decoders" and inner[1] != "__init__":
            # Pixel decoders are mask2former's; eomt has blocks of a transformer.
            lower = ("layers", "kernels", "queries", "transformer", "decoders.pixel_decoders")
            allowed = ("segkit.core", *(f"segkit.models.{part}" for part in lower))
            assert name.startswith(allowed)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_imported_inside_a_function(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for name in imports(node):
                assert any(name.startswith(package) for package in OPTIONAL), f"{node.name}: {name}"


def test_only_the_six_packages_are_imported() -> None:
    allowed = {"torch", "torchvision", "numpy", "pycocotools", "PIL", "tqdm", "segkit"}
    optional = {package.split(".")[0] for package in OPTIONAL}
    for path in [*MODULES, ROOT / "train.py", ROOT / "infer.py"]:
        for name in imports(ast.parse(path.read_text())):
            top = name.split(".")[0]
            assert top in allowed | optional | sys.stdlib_module_names, f"{path.name}: {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_public_thing_has_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def test_two_classes_never_share_a_name() -> None:
    names = [
        node.name
        for path in MODULES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    ]
    assert {name for name in names if names.count(name) > 1} == set()


def test_importing_is_no_dearer_than_torch_and_torchvision() -> None:
    code = "import sys; import torch, torchvision, numpy; a = set(sys.modules); "
    code += "import signal as s; handlers = [*map(s.getsignal, s.valid_signals())]; import segkit; "
    code += "assert handlers == [*map(s.getsignal, s.valid_signals())]; "  # signals are commands'
    code += "print(*sorted(m for m in set(sys.modules) - a if not m.startswith('segkit')))"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"matplotlib", "tensorboard", "wandb", "torch._inductor", "scipy", "pandas"}
    assert not heavy & set(shown.stdout.split()), shown.stdout
