"""Making a generator of the kind that a recipe names."""

from __future__ import annotations

from pkgutil import resolve_name

from realtime.spectral import SpectralSpec
from training.models import ANSWERS
from training.models.autoencoder import Autoencoder
from training.models.generator import Generator, GeneratorConfig, SpectrumGenerator


def make_generator(
    spec: SpectralSpec, config: GeneratorConfig, oscillates: bool = False
) -> Generator | SpectrumGenerator | Autoencoder:
    """The kind that ``config.answer`` names, untrained; ``oscillates`` is for gains alone."""
    if oscillates:
        return Generator(spec, config, oscillates)
    return resolve_name(ANSWERS[config.answer])(spec, config)
