"""Whether sounds made in a style are spread as its recordings are, by how taught classifiers score both."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from training.models.classifier import Opinion  # noqa: E402
from training.objectives.likeness import ENOUGH, StyleMemory  # noqa: E402

ROWS, FEATURES = 400, 4


def opinion(found: Tensor, part: int = 0) -> Opinion:
    return Opinion(torch.zeros(1, len(found), found.shape[1]), found[None], (part,))


def drawn(seed: int, spread: float = 1.0, middle: float = 0.0) -> Tensor:
    return middle + spread * torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(seed))


def unlikeness(real: Tensor, made: Tensor) -> float:
    """The mean over many made sounds of one style, a few at a time, among recordings of two."""
    memory, one, everything = StyleMemory(), torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.bool)
    memory.hear_real(opinion(9.0 + real[:8]), one + 1, everything)  # another style, far away
    costs = []
    for recordings, sounds in zip(real.split(8), made.split(8), strict=True):
        memory.hear_real(opinion(recordings), one, everything)
        costs.append(memory.unlikeness(opinion(sounds), one, everything))
    return float(torch.cat(costs)[10 * 8 :].mean())


def test_what_is_spread_as_the_recordings_are_costs_nothing() -> None:
    assert unlikeness(drawn(0), drawn(1)) == pytest.approx(0.0, abs=0.04)


@pytest.mark.parametrize(("spread", "middle"), [(1.0, 0.8), (0.05, 0.0), (0.0, 0.5)])
def test_what_lies_elsewhere_or_is_always_the_same_costs_something(spread: float, middle: float) -> None:
    assert unlikeness(drawn(0), drawn(1, spread, middle)) > 0.1


def test_a_sound_is_drawn_to_the_recordings_and_away_from_what_was_made() -> None:
    memory, style, heard = StyleMemory(), torch.zeros(ENOUGH, dtype=torch.long), torch.ones(ENOUGH, dtype=torch.bool)
    line = torch.linspace(-0.1, 0.1, ENOUGH)[:, None] * torch.ones(2)
    memory.hear_real(opinion(line + torch.tensor([1.0, 0.0])), style, heard)
    assert not memory.unlikeness(opinion(line + torch.tensor([0.0, 1.0])), style, heard).any()  # too few made before
    sound = torch.zeros(1, 2, requires_grad=True)
    memory.unlikeness(opinion(sound), style[:1], heard[:1]).sum().backward()
    assert sound.grad is not None
    right, up = (-sound.grad[0]).tolist()
    assert right > 0.5 and up < -0.5


def test_parts_styles_and_silence_are_kept_apart() -> None:
    memory, style, heard = StyleMemory(), torch.zeros(ENOUGH, dtype=torch.long), torch.ones(ENOUGH, dtype=torch.bool)
    sounds = torch.randn(ENOUGH, 2, generator=torch.Generator().manual_seed(0))
    memory.hear_real(opinion(sounds), style, heard)
    memory.unlikeness(opinion(sounds + 1.0), style, heard)
    assert memory.unlikeness(opinion(sounds[:1] + 3.0), style[:1], heard[:1]).item() != 0.0
    assert memory.unlikeness(opinion(sounds[:1] + 3.0, part=1), style[:1], heard[:1]).item() == 0.0
    assert memory.unlikeness(opinion(sounds[:1] + 3.0), style[:1] + 1, heard[:1]).item() == 0.0
    assert memory.unlikeness(opinion(sounds[:1] + 3.0), style[:1], ~heard[:1]).item() == 0.0
