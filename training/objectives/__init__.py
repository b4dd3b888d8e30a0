"""Training objectives by name. An objective is a LightningModule; a recipe names it."""

from __future__ import annotations

from importlib import import_module

OBJECTIVES: dict[str, str] = {
    "restore": "training.objectives.restore:RestoreObjective",
    "cycle": "training.objectives.cycle:CycleObjective",
    "generate": "training.objectives.generate:GenerateObjective",
    "compose": "training.objectives.compose:ComposeObjective",
    "recognise": "training.objectives.recognise:RecogniseObjective",
}


def objective_class(name: str) -> type:
    """The LightningModule class registered under this name, imported when asked for. KeyError if unknown."""
    module, _, attribute = OBJECTIVES[name].partition(":")
    return getattr(import_module(module), attribute)
