"""Imports run one way (docs/bootpig.md, "The map"): cli -> methods, evaluation -> pipelines -> models -> attention."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Room -> what it may import besides itself, `pig.errors`, `pig.diffusion`, `pig.data` and `pig.toyworld.scene`.
ALLOWED = {
    "attention": set(),
    "diffusion": set(),
    "errors": set(),
    "data": set(),
    "models": {"attention"},
    "pipelines": {"models", "attention"},
    "methods": {"pipelines", "models", "attention"},
    "evaluation": {"models"},
    "callbacks": {"methods", "evaluation", "models"},
    "toyworld": {"methods", "models"},
    "generate": {"attention", "methods", "models", "pipelines"},
    "app": {"page", "generate", "models", "pipelines"},
    "page": {"app", "attention", "models", "pipelines"},
    "memory": {"callbacks", "methods", "models"},
    "cli": {"app", "generate", "memory", "methods", "evaluation", "pipelines", "models"},
    "demo": {"generate", "methods", "evaluation", "pipelines", "models"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("pig", "data_gen")}


def test_imports_run_one_way() -> None:
    for path in (ROOT / "pig").rglob("*.py"):
        room = path.relative_to(ROOT / "pig").parts[0].removesuffix(".py")
        for name in imports(path):
            assert not name.startswith("data_gen"), f"{path} imports {name}"
            target = name.split(".")[1]
            free = {room, "errors", "diffusion", "data"} if room not in ("errors", "data") else {room, "errors"}
            if name.startswith("pig.toyworld.scene"):
                continue
            if room != "__init__":
                assert target in ALLOWED[room] | free or name.startswith("pig.data.schema"), f"{path} imports {name}"


def test_only_attention_touches_attention_processors() -> None:
    for path in (ROOT / "pig").rglob("*.py"):
        if path.parts[-2:] not in (("pig", "attention.py"), ("stages", "unet.py")):
            assert "attention_processor" not in path.read_text(), path
