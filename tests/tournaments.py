"""The toy world's tournament."""

from __future__ import annotations

from pathlib import Path

from pig.commands.tournament.config import load_config

CONFIG = Path("configs/tournament/toyworld.yaml")
CLAIMS = sorted(Path("configs/claims").glob("*.yaml"))


def without_trials(file: Path = CONFIG) -> list[str]:
    """Words over `file` that leave its trials out, on whose results drawings depend."""
    return [f"methods.{name}.trials=[]" for name in load_config(file, []).methods]
