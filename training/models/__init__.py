"""The kinds of generator by the names that a recipe gives to ``model.answer``: a file and a line here for each."""

from __future__ import annotations

ANSWERS: dict[str, str] = {
    "gains": "training.models.generator:Generator",
    "spectrum": "training.models.generator:SpectrumGenerator",
    "autoencoder": "training.models.autoencoder:Autoencoder",
}
