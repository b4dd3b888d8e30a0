"""Making a generator of the kind that a recipe names."""

from __future__ import annotations

from collections.abc import Collection
from pkgutil import resolve_name

from realtime.spectral import SpectralSpec
from training.models import ANSWERS
from training.models.autoencoder import Autoencoder
from training.models.generator import Generator, GeneratorConfig, SpectrumGenerator


def make_generator(
    spec: SpectralSpec, config: GeneratorConfig, traits: Collection[str] = ()
) -> Generator | SpectrumGenerator | Autoencoder:
    """The kind that ``config.answer`` names, untrained; ``traits`` are for gains alone."""
    kind = resolve_name(ANSWERS[config.answer])
    return kind(spec, config, traits) if traits else kind(spec, config)
