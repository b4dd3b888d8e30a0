"""What a recurrent body still knows of one style when it plays another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FORGOTTEN_AT_MOST = 0.5  # of what a body remembers, within one hop
OF_THE_MOVE = 0.5  # from one style's usual memory to another's, that what is remembered takes part in


class Memory(nn.Module):
    """Carries a body's hidden state over from one style to the next.

    What a body remembers of a flute is nothing that it would ever remember of a harpsichord: a pluck that comes next
    sounds several times too loud, or not at all, for a tenth of a second. While the style vector moves, the state
    moves half as far as the styles' usual states lie apart, and forgets, the more the faster the vector moves, towards
    the usual state of the new style. As long as a style stays, nothing changes.
    """

    latency_samples = 0
    directions: Tensor  # [style_dim, hidden]: the usual state is affine in the style vector
    offset: Tensor  # [hidden]

    def __init__(self, style_dim: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("directions", torch.zeros(style_dim, hidden), persistent=False)
        self.register_buffer("offset", torch.zeros(hidden), persistent=False)

    def fit(self, vectors: Tensor, usual: Tensor) -> None:
        """The states [styles, hidden] that are usual in the styles of these ``vectors`` [styles, style_dim]."""
        known = torch.cat([vectors.detach(), torch.ones_like(vectors[:, :1])], dim=1).double().cpu()
        found = (torch.linalg.pinv(known) @ usual.double().cpu()).to(self.directions)
        self.directions.copy_(found[:-1])
        self.offset.copy_(found[-1])

    def forward(self, hidden: Tensor, style: Tensor, before: Tensor, moved: Tensor) -> Tensor:
        """hidden [batch, hidden]; the styles of this hop and of the one ``before`` [batch, style_dim], zeros at the
        start, and how far they are ``apart`` [batch, 1] -> hidden [batch, hidden]."""
        playing = before.abs().amax(dim=1, keepdim=True).sign()  # at the start there is nothing to forget
        lost = playing * moved.square().clamp_max(FORGOTTEN_AT_MOST)
        usual = torch.matmul(style, self.directions) + self.offset
        shift = torch.matmul(OF_THE_MOVE * playing * (style - before), self.directions)
        return hidden + lost * (usual - hidden) + (1.0 - lost) * shift
