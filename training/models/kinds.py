"""The kinds of generator that a recipe may name in ``model.answer``."""

from __future__ import annotations

from realtime.spectral import SpectralSpec
from training.models.autoencoder import Autoencoder
from training.models.generator import Generator, GeneratorConfig, SpectrumGenerator


def make_generator(spec: SpectralSpec, config: GeneratorConfig) -> Generator | SpectrumGenerator | Autoencoder:
    """The kind that ``config.answer`` names, untrained."""
    kinds = {"gains": Generator, "spectrum": SpectrumGenerator, "autoencoder": Autoencoder}
    return kinds[config.answer](spec, config)
