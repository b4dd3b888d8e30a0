"""The kinds of generator that a recipe may name in ``model.answer``: one file and one line here for each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from realtime.spectral import SpectralSpec

if TYPE_CHECKING:
    from training.models.autoencoder import Autoencoder
    from training.models.generator import Generator, GeneratorConfig, SpectrumGenerator

ANSWERS: dict[str, str] = {
    "gains": "training.models.generator:Generator",
    "spectrum": "training.models.generator:SpectrumGenerator",
    "autoencoder": "training.models.autoencoder:Autoencoder",
}


def make_generator(spec: SpectralSpec, config: GeneratorConfig) -> Generator | SpectrumGenerator | Autoencoder:
    """The kind that ``config.answer`` names, untrained."""
    module, _, attribute = ANSWERS[config.answer].partition(":")
    return getattr(import_module(module), attribute)(spec, config)
