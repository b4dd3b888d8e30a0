"""What sets styles apart besides their sound: which of them have a trait, and how long their gains take to move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

LEVEL_SHARE = 0.5  # of a rise of what is played that a slow attack holds back, besides all of a rise of gains
FORGOTTEN_APART = 0.5  # of any number of two style vectors: a style so far off owes nothing to the one before
KEPT = 0.7  # of what was held back, a hop after such a switch, so that it does not come back at one blow


class Trait(nn.Module):
    """How much of a trait a style has: an affine function of its vector, so that blends have some of each's."""

    direction: Tensor  # [style_dim]
    offset: Tensor  # [1]

    def __init__(self, style_dim: int) -> None:
        super().__init__()
        self.register_buffer("direction", torch.zeros(style_dim), persistent=False)
        self.register_buffer("offset", torch.zeros(1), persistent=False)

    def fit(self, vectors: Tensor, wanted: Sequence[bool]) -> None:
        """Give the trait to the styles of these ``vectors`` [styles, style_dim] that are ``wanted``, alone.

        To all of them a quarter more, or less than nothing, so that an overdone style keeps what it has.
        """
        known = torch.cat([vectors.detach(), torch.ones_like(vectors[:, :1])], dim=1).double().cpu()
        goal = torch.where(torch.tensor(list(wanted)), 1.25, -0.25).double()
        found = (torch.linalg.pinv(known) @ goal).to(self.direction)
        self.direction.copy_(found[:-1])
        self.offset.copy_(found[-1:])

    def forward(self, style: Tensor) -> Tensor:
        """style [batch, style_dim] -> how much of the trait it has, from 0 to 1 [batch]."""
        return (torch.matmul(style, self.direction) + self.offset).clamp(0.0, 1.0)


@dataclass(frozen=True)
class BallisticsState:
    style: Tensor  # [batch, style_dim]
    last: Tensor  # [batch, channels, gain|level]: what was asked for and what was played at the end of the last hop
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
    most: Tensor  # [attack|release], nepers

    def __init__(self, hop_seconds: float, attack_s: float, attack_db: float, release_s: float, style_dim: int) -> None:
        """``attack_db``: how far a slow attack holds back at most."""
        super().__init__()
        self.slow_attack, self.slow_release = Trait(style_dim), Trait(style_dim)
        kept = np.exp(-hop_seconds / np.array([attack_s, release_s]))
        for name, value in {
            "pace": kept[:, None] * np.array([[1.0], [-1.0]]),
            "held": np.diag(kept),
            "most": np.array([attack_db * np.log(10.0) / 20.0, np.inf]),
        }.items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32), persistent=False)

    def init_state(self, batch: int, channels: int) -> BallisticsState:
        style_dim = len(self.slow_attack.direction)
        return BallisticsState(
            torch.zeros(batch, style_dim), torch.zeros(batch, channels, 2), torch.zeros(batch, channels, 2)
        )

    def forward(
        self, gains: Tensor, level: Tensor, style: Tensor, state: BallisticsState
    ) -> tuple[Tensor, BallisticsState]:
        """gains and the level of what is played, both in nepers [batch, n, channels], and style [batch, style_dim] ->
        gains [batch, n, channels]."""
        batch, hops, channels = gains.shape
        of_style = style.detach()
        attack, release = self.slow_attack(of_style), self.slow_release(of_style)
        now = torch.stack([gains, level], dim=3)  # [batch, n, channels, gain|level]
        apart = (style - state.style).abs().amax(dim=1, keepdim=True)
        same = (1.0 - apart / FORGOTTEN_APART).clamp_min(0.0)  # [batch, 1]
        steps = now - torch.cat([state.last[:, None], now[:, :-1]], dim=1)
        # What another style asks for is no rise; what is played rises whatever the style.
        own = torch.cat([same, torch.ones_like(same)], dim=1)[:, None, None]
        steps = torch.cat([own * steps[:, :1], steps[:, 1:]], dim=1)
        steps = steps[..., 0] + LEVEL_SHARE * attack[:, None, None] * steps[..., 1]
        behind = (same.clamp_min(KEPT)[..., None] * state.behind).reshape(1, batch * channels, 2)
        behind = self._behind(steps.transpose(0, 1).reshape(hops, batch * channels, 1), behind)
        behind = behind.reshape(hops, batch, channels, 2).transpose(0, 1)
        shares = torch.stack([-attack, release], dim=1)[:, None, :, None]
        moved = gains + torch.matmul(torch.minimum(behind, self.most), shares)[..., 0]
        return moved, BallisticsState(style, now[:, -1], behind[:, -1])

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
