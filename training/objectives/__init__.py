"""Training objectives by name. An objective is a LightningModule; a recipe names it."""

from __future__ import annotations

from pkgutil import resolve_name

OBJECTIVES: dict[str, str] = {
    "restore": "training.objectives.restore:RestoreObjective",
    "cycle": "training.objectives.cycle:CycleObjective",
    "generate": "training.objectives.generate:GenerateObjective",
    "compose": "training.objectives.compose:ComposeObjective",
    "recognise": "training.objectives.recognise:RecogniseObjective",
}


def objective_class(name: str) -> type:
    """The LightningModule class registered under this name, imported when asked for. KeyError if unknown."""
    return resolve_name(OBJECTIVES[name])
