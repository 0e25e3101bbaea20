"""The house: imports run one way, methods know nothing of each other, only one folder touches attention."""

from __future__ import annotations

import ast
from pathlib import Path

from pig.methods import METHODS

ROOT = Path(__file__).parents[1]
# From the ground floor up: a room may import those above it in this list, and itself.
FLOORS = (
    ("errors",),
    ("files",),
    ("mistakes", "pages", "processes"),
    ("costs", "diffusion", "executors"),
    ("data",),
    ("attention", "models"),
    ("evaluation",),  # knows no method, no training, no sampling
    ("sampling",),
    ("training",),
    ("methods",),
    ("arguments",),
    ("commands",),
    ("cli", "demo"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# What the floors alone do not say.
NEVER = {("sampling", "evaluation"), ("methods", "evaluation"), ("evaluation", "attention")}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("pig", "data_gen")}


def files() -> list[Path]:
    return sorted((ROOT / "pig").rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "pig").parts[0].removesuffix(".py")


def test_imports_run_one_way() -> None:
    for path in files():
        room = room_of(path)
        for name in imports(path):
            assert not name.startswith("data_gen"), f"{path} imports {name}"
            target = name.split(".")[1]
            assert (room, target) not in NEVER, f"{path} imports {name}"
            if target == room or "toyworld" in (room, target) or room == "__init__":
                continue
            assert FLOOR[target] < FLOOR[room], f"{path} imports {name}"


def test_the_toy_world_is_for_its_stages_and_its_demonstration() -> None:
    for path in files():
        room = room_of(path)
        for name in imports(path):
            if name.startswith("pig.toyworld"):
                demonstrates = room in ("toyworld", "demo") or path.name == "examples.py"
                assert demonstrates, f"{path} imports {name}"
            if room == "toyworld":
                free = ("toyworld", "models", "data", "diffusion", "errors", "files")
                assert name.split(".")[1] in free or name.startswith("pig.training.checkpoints"), f"{path}: {name}"


def test_no_circle() -> None:
    """Among modules, imports inside of functions included."""
    modules = {path: "pig." + ".".join(path.relative_to(ROOT / "pig").with_suffix("").parts) for path in files()}
    modules = {path: name.removesuffix(".__init__") for path, name in modules.items()}
    known, edges = set(modules.values()), {}
    for path, module in modules.items():
        named = {name if name in known else name.rpartition(".")[0] for name in imports(path)}
        edges[module] = {name for name in named if name in known and name != module}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for other in edges[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_methods_know_nothing_of_each_other() -> None:
    for path in (ROOT / "pig/methods").rglob("*.py"):
        own = path.relative_to(ROOT / "pig/methods").parts[0]
        for name in imports(path):
            other = name.removeprefix("pig.methods.").split(".")[0]
            if name.startswith("pig.methods.") and other in METHODS:
                assert other == own, f"{path} imports {name}"
    for path in files():
        if room_of(path) in ("training", "sampling", "data", "evaluation", "models", "attention"):
            for name in imports(path):
                assert not name.startswith("pig.methods"), f"{path} imports {name}"


def test_only_attention_touches_attention_processors() -> None:
    for path in files():
        if room_of(path) != "attention" and path.parts[-2:] != ("stages", "unet.py"):
            assert "attention_processor" not in path.read_text(), path


# What reads better whole than in parts, and how long it is at most.
WHOLE = {"build_page": 110, "__call__": 110, "score": 90}


def test_nothing_is_too_long_to_read() -> None:
    for path in files():
        lines = len(path.read_text().splitlines())
        assert lines <= 350, f"{path}: {lines} lines"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= WHOLE.get(node.name, 80), f"{path}: {node.name} has {length} lines"
    for path in (ROOT / "tests").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 350, path
