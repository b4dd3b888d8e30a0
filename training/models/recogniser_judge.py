"""A recogniser that has learned judges what a generator makes, beside the classifiers or in their place.

It knows nine in ten phrases of recordings that it never heard, after one second, where a part of a classifier knows
eight: it points to styles more surely. It learned from real recordings alone, and stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.layers import on_device
from training.models.classifier import hidden_stretch, played_elsewhere
from training.models.streaming_recogniser import StreamingRecogniser

COLOURED_SHARE = 0.7  # of rows; the others are heard as they are


def heard_elsewhere(net: StreamingRecogniser, power: Tensor, peak: Tensor, random: torch.Generator) -> Tensor:
    """Mel power from ``listen`` and the state's ``peak`` -> what ``relate`` makes of it: the same shape.

    Most rows as if played elsewhere: through a random equaliser, on hiss, with a stretch of bands and one of frames
    silenced.
    """
    batch, bands, frames = power.shape[0], power.shape[2], power.shape[3]
    # Both resolutions side by side, so that they meet the same equaliser.
    elsewhere = played_elsewhere(power.transpose(1, 2).flatten(2), random)
    elsewhere = elsewhere.unflatten(2, (-1, frames)).transpose(1, 2)
    coloured = torch.rand(batch, generator=random, device=power.device) < COLOURED_SHARE
    seen, _ = net.relate(torch.where(coloured[:, None, None, None], elsewhere, power), peak)
    hidden = hidden_stretch(batch, bands, random)[:, :, None] | hidden_stretch(batch, frames, random)[:, None]
    return seen.masked_fill((hidden & coloured[:, None, None])[:, None], 0.0)


class RecogniserJudge(nn.Module):
    """A recogniser that has learned: it says how much it hears of each style of a run, and stays as it is."""

    def __init__(self, net: StreamingRecogniser, known: Sequence[str], wanted: Sequence[str]) -> None:
        """``known``: ids of the styles of ``net``; ``wanted``: those of the run, in its order, all of them known."""
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.rows = [known.index(style) for style in wanted]

    def forward(self, audio: Tensor, random: torch.Generator) -> Tensor:
        """audio [batch, samples], a hop at least -> scores [batch, styles] at its end, of colours from ``random``."""
        hop = self.net.spec.hop_samples
        state = on_device(self.net.init_state(len(audio)), audio.device)
        power, _ = self.net.listen(audio[:, : audio.shape[1] // hop * hop], state.framer)
        said, _ = self.net.recognise(heard_elsewhere(self.net, power, state.peak, random), state)
        return said.scores[:, -1, self.rows]
