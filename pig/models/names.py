"""Names of models: `toyworld` stands for the embedded ones."""

from __future__ import annotations

from pathlib import Path

TOYWORLD = "toyworld"
WEIGHTS = Path(__file__).parents[1] / "toyworld/weights"
FORMS = (
    f"a folder made by `export` or `tune`, `dreamblend:FOLDER` made by `tune`, `{TOYWORLD}`, `{TOYWORLD}/METHOD`, "
    "or `base:NAME` for a Stable Diffusion without references"
)


def resolve(name: str | Path, part: str = "base") -> str:
    """The folder of an embedded model for the name `toyworld`; any other name as it is."""
    return str(WEIGHTS / part) if str(name) == TOYWORLD else str(name)
