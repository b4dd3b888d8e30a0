"""A small model of kind ``generate`` for tests: untrained, but a whole file. Imports torch when it is made."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from realtime.bundle import Card, Source


def write_source(path: Path, verify_hops: int = 200) -> float:
    """Two styles, far apart, at ``path``; the largest difference between torch and onnxruntime."""
    import torch

    from export.writer import NamedStyle, write_model
    from realtime.spectral import SpectralSpec
    from training.models.generator import GeneratorConfig
    from training.models.noise_player import NoisePlayer

    torch.manual_seed(0)
    player = NoisePlayer(SpectralSpec(), GeneratorConfig(style_dim=4, band_count=12, hidden=16)).eval()
    with torch.no_grad():
        player.leave.weight.mul_(5.0)
        player.choose.weight.mul_(8.0)
    random = np.random.default_rng(0)
    styles = [
        NamedStyle(name, name.title(), program, (2.0 * random.standard_normal(4)).astype(np.float32))
        for name, program in (("reed", 20), ("bell", 14))
    ]
    card = Card(
        "made in a test", "generate", "", "2026-01-01", 0, 0.0, (Source("reed", "CC0-1.0", "nobody", 1, 0.1),), {}, ()
    )
    spec = player.spec
    return write_model(player, spec, styles, card, path, "source", verify_hops, kind="generate").largest_difference
