"""A U-Net over mel or linear bands and frames, causal in time, steered by a style vector at every depth.

Ronneberger, Fischer and Brox, "U-Net", 2015, with strides along frequency alone, so that every frame is answered at
once; on spectrograms: Jansson et al., "Singing voice separation with deep U-Net convolutional networks", 2017. A style
scales and shifts features (Perez et al., "FiLM", 2018, eq. 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

CHANNELS = (16, 24, 32, 48)  # from the top down
FRAMES = 2  # that a convolution hears: the newest, and one so many frames before it:
DILATIONS = (1, 2, 4, 8)
BANDS_STEP = 2 ** len(CHANNELS)
"""A number of bands must be a multiple of this."""


@dataclass(frozen=True)
class UNetState:
    past: Tensor  # [batch, numbers]: the frames that each convolution still needs, one after the other


class UNet(nn.Module):
    """Frames of ``inputs`` pictures over bands -> frames of ``outputs`` pictures over as many bands."""

    latency_samples = 0

    def __init__(self, bands: int, inputs: int, outputs: int, style_dim: int) -> None:
        super().__init__()
        sizes = [inputs, *CHANNELS]
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, (FRAMES, 3), stride=(1, 2), dilation=(d, 1), padding=(0, 1))
            for (a, b), d in zip(pairwise(sizes), DILATIONS, strict=True)
        )
        # What comes up from below meets what was there on the way down.
        self.up = nn.ModuleList(nn.Conv2d(b + a, a, (1, 3), padding=(0, 1)) for a, b in pairwise(CHANNELS))
        self.leave = nn.Conv2d(CHANNELS[0] + inputs, outputs, (1, 3), padding=(0, 1))
        self.steer = nn.Linear(style_dim, 2 * sum(CHANNELS))
        self.pasts = [(a, d, bands >> depth) for depth, (a, d) in enumerate(zip(sizes, DILATIONS, strict=False))]
        with torch.no_grad():
            self.leave.weight.mul_(0.1)
            self.steer.weight.mul_(0.5)

    def init_state(self, batch: int) -> UNetState:
        return UNetState(torch.zeros(batch, sum(a * d * b for a, d, b in self.pasts)))

    def forward(self, x: Tensor, style: Tensor, state: UNetState) -> tuple[Tensor, UNetState]:
        """x [batch, inputs, n, bands], style [batch, style_dim] -> [batch, outputs, n, bands]."""
        batch, kept, ways_down = x.shape[0], [], [x]
        scales, shifts = (part.split(CHANNELS, dim=1) for part in self.steer(style).chunk(2, dim=1))
        pasts = state.past.split([a * d * b for a, d, b in self.pasts], dim=1)
        for convolution, past, shape, scale, shift in zip(self.down, pasts, self.pasts, scales, shifts, strict=True):
            heard = torch.cat([past.reshape(batch, *shape), x], dim=2)
            kept.append(heard[:, :, -shape[1] :].flatten(1))
            steered = convolution(heard) * (1.0 + scale[:, :, None, None]) + shift[:, :, None, None]
            x = nn.functional.leaky_relu(steered, 0.1)
            ways_down.append(x)
        for convolution, beside in zip(reversed(self.up), reversed(ways_down[1:-1]), strict=True):
            x = nn.functional.leaky_relu(convolution(torch.cat([_twice(x), beside], dim=1)), 0.1)
        return self.leave(torch.cat([_twice(x), ways_down[0]], dim=1)), UNetState(torch.cat(kept, dim=1))


def _twice(x: Tensor) -> Tensor:
    """[..., bands] -> [..., 2 * bands], every band two times."""
    return x.unsqueeze(-1).expand(*x.shape, 2).flatten(-2)
