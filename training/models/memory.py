"""What a recurrent body still knows of one style when it plays another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.models.traits import AffineOfStyle

FORGOTTEN_AT_MOST = 0.5  # of what a body remembers, within one hop
OF_THE_MOVE = 0.5  # from one style's usual memory to another's, that what is remembered takes part in


class Memory(nn.Module):
    """Carries a body's hidden state over from one style to the next.

    What a body remembers of a flute is nothing that it would ever remember of a harpsichord: a pluck that comes next
    sounds several times too loud, or not at all, for a tenth of a second. While the style vector moves, the state
    moves half as far as the styles' usual states lie apart, and forgets, the more the faster the vector moves, towards
    the usual state of the new style. As long as a style stays, nothing changes. Until ``usual`` is fitted, zeros are.
    """

    latency_samples = 0

    def __init__(self, style_dim: int, hidden: int) -> None:
        super().__init__()
        self.usual = AffineOfStyle(style_dim, hidden)  # state

    def forward(self, hidden: Tensor, style: Tensor, before: Tensor, moved: Tensor) -> Tensor:
        """hidden [batch, hidden]; the styles of this hop and of the one ``before`` [batch, style_dim], zeros at the
        start, and how far they are ``apart`` [batch, 1] -> hidden [batch, hidden]."""
        playing = before.abs().amax(dim=1, keepdim=True).sign()  # at the start there is nothing to forget
        lost = playing * moved.square().clamp_max(FORGOTTEN_AT_MOST)
        shift = torch.matmul(OF_THE_MOVE * playing * (style - before), self.usual.directions)
        return hidden + lost * (self.usual(style) - hidden) + (1.0 - lost) * shift
