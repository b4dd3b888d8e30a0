"""What sets styles apart besides their sound: which of them have a trait, and how long their gains take to move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

TRAITS = ("oscillator", "slow_attack", "slow_release")  # of a style, beside its vector
LEVEL_SHARE = 0.5  # of a rise of what is played that a slow attack holds back, besides all of a rise of gains
FORGOTTEN_APART = 0.5  # of any number of two style vectors: a style so far off owes nothing to the one before
KEPT = 0.7  # of what was held back, a hop after such a switch, so that it does not come back at one blow


def apart(style: Tensor, before: Tensor) -> Tensor:
    """How far styles are from those of the hop before [batch, style_dim]: the most of any number [batch, 1]."""
    return (style - before).detach().abs().amax(dim=1, keepdim=True)


class AffineOfStyle(nn.Module):
    """Numbers that known styles have, as an affine function of the style vector: blends have some of each's."""

    directions: Tensor  # [style_dim, numbers]
    offset: Tensor  # [numbers]

    def __init__(self, style_dim: int, numbers: int) -> None:
        super().__init__()
        self.register_buffer("directions", torch.zeros(style_dim, numbers), persistent=False)
        self.register_buffer("offset", torch.zeros(numbers), persistent=False)

    def fit(self, vectors: Tensor, wanted: Tensor) -> None:
        """The numbers ``wanted`` [styles, numbers] of the styles of these ``vectors`` [styles, style_dim]."""
        known = torch.cat([vectors.detach(), torch.ones_like(vectors[:, :1])], dim=1).double().cpu()
        found = (torch.linalg.pinv(known) @ wanted.double().cpu()).to(self.directions)
        self.directions.copy_(found[:-1])
        self.offset.copy_(found[-1])

    def forward(self, style: Tensor) -> Tensor:
        """style [batch, style_dim] -> [batch, numbers]."""
        return torch.matmul(style, self.directions) + self.offset


class Traits(nn.Module):
    """How much of each trait a style has."""

    def __init__(self, style_dim: int) -> None:
        super().__init__()
        self.of_style = AffineOfStyle(style_dim, len(TRAITS))

    def fit(self, vectors: Tensor, wanted: Mapping[str, Sequence[bool]]) -> None:
        """Give each trait to the styles of these ``vectors`` [styles, style_dim] that are ``wanted``, alone.

        To all of them a quarter more, or less than nothing, so that an overdone style keeps what it has.
        """
        having = torch.tensor([wanted.get(name, [False] * len(vectors)) for name in TRAITS]).T
        self.of_style.fit(vectors, torch.where(having, 1.25, -0.25))

    def forward(self, style: Tensor) -> Tensor:
        """style [batch, style_dim] -> how much of each trait it has, from 0 to 1 [batch, TRAITS]."""
        return self.of_style(style.detach()).clamp(0.0, 1.0)


@dataclass(frozen=True)
class BallisticsState:
    gains: Tensor  # [batch, channels]: what was asked for at the end of the last hop
    level: Tensor  # [batch, 1]: what was played then
    behind: Tensor  # [batch, channels, attack|release]: how far gains that take their time are behind these


class Ballistics(nn.Module):
    """Gains that rise within an attack time or fall within a release time, in the styles that want it.

    A bow and a breath take their time, and what was struck rings on; gains that follow every change of what is played
    do neither. Each is a one-pole filter one way and follows at once the other way, as in a compressor (Giannoulis,
    Massberg and Reiss, "Digital dynamic range compressor design", 2012, section 2.2), here of gains in nepers. A slow
    attack holds back some of what is played as well, so that a pluck swells, and never more than a few dB, so that it
    is heard at once.
    """

    latency_samples = 0
    pace: Tensor  # [attack|release, 1]: what a change still owes a hop later; a release is a rise turned over
    held: Tensor  # [attack|release, attack|release]
    each: Tensor  # [attack|release, attack|release, 1]: what takes one of both

    def __init__(self, hop_seconds: float, attack_s: float, attack_db: float, release_s: float) -> None:
        """``attack_db``: how far a slow attack holds back at most."""
        super().__init__()
        kept = np.exp(-hop_seconds / np.array([attack_s, release_s]))
        self.most = attack_db * float(np.log(10.0)) / 20.0  # nepers
        for name, value in {
            "pace": kept[:, None] * np.array([[1.0], [-1.0]]),
            "held": np.diag(kept),
            "each": np.eye(2)[:, :, None],
        }.items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32), persistent=False)

    def init_state(self, batch: int, channels: int) -> BallisticsState:
        return BallisticsState(torch.zeros(batch, channels), torch.zeros(batch, 1), torch.zeros(batch, channels, 2))

    def forward(
        self, gains: Tensor, level: Tensor, attack: Tensor, release: Tensor, moved: Tensor, state: BallisticsState
    ) -> tuple[Tensor, BallisticsState]:
        """gains [batch, n, channels] and the level of what is played [batch, n, 1], in nepers; how much the style has
        of a slow ``attack`` and ``release``, and how far it is ``apart`` from the one before, all [batch, 1] -> gains
        [batch, n, channels]."""
        batch, hops, channels = gains.shape
        same = (1.0 - moved / FORGOTTEN_APART).clamp_min(0.0)
        # What another style asks for is no rise; what is played rises whatever the style.
        first = gains[:, :1]
        last = first + same[:, None] * (state.gains[:, None] - first)
        asked = gains - torch.cat([last, gains[:, :-1]], dim=1)
        played = level - torch.cat([state.level[:, None], level[:, :-1]], dim=1)
        steps = asked + (LEVEL_SHARE * attack)[:, None] * played
        behind = (same.clamp_min(KEPT)[..., None] * state.behind).reshape(1, batch * channels, 2)
        behind = self._behind(steps.transpose(0, 1).reshape(hops, batch * channels, 1), behind)
        behind = behind.reshape(hops, batch, channels, 2).transpose(0, 1)
        rising, falling = (torch.matmul(behind, taken).squeeze(3) for taken in self.each)
        settled = gains + release[:, None] * falling - attack[:, None] * rising.clamp_max(self.most)
        return settled, BallisticsState(gains[:, -1], level[:, -1], behind[:, -1])

    def _behind(self, steps: Tensor, behind: Tensor) -> Tensor:
        """steps [n, rows, 1] and what was behind before [1, rows, 2] -> [n, rows, attack|release]."""
        if not torch.onnx.is_in_onnx_export():
            weights = [self.pace, self.held]
            return torch.rnn_relu(steps, behind, weights, False, 1, 0.0, False, False, False)[0]
        hops, rows = steps.shape[0], steps.shape[1]
        y, _ = torch.onnx.ops.symbolic_multi_out(
            "RNN",
            [steps, self.pace[None], self.held[None], None, None, behind],
            attrs={"hidden_size": 2, "activations": ["Relu"]},
            dtypes=[torch.float32, torch.float32],
            shapes=[[hops, 1, rows, 2], [1, rows, 2]],
            version=14,
        )
        return y[:, 0]
