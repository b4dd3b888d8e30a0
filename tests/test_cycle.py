"""CycleGAN: there and back again, a pool of past fakes, and noise that is part of the style vector."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor  # noqa: E402

from tests.conftest import SAX_STYLE, tiny_recipe  # noqa: E402
from training.beginning import Beginning  # noqa: E402
from training.objectives.cycle import CycleObjective, FakePool  # noqa: E402
from training.objectives.judges import Fakes  # noqa: E402
from training.objectives.restore import Batch  # noqa: E402
from training.recipe import Recipe, RecipeError, load_recipe  # noqa: E402

SECOND = SAX_STYLE.replace('id = "sax"', 'id = "other"')
CYCLE = '[adversary]\nweight = 1.0\nloss = "least_squares"\n[cycle]\nnoise_dims = 2\npool_size = 3\n'


def recipe_in(folder: Path, *changes: str, text: str = CYCLE) -> Recipe:
    path = folder / "cycle.toml"
    path.write_text('objective = "cycle"\n' + tiny_recipe(0.1) + text + SAX_STYLE + SECOND)
    return load_recipe(path, changes)


def batch(recipe: Recipe, rows: int = 4) -> Batch:
    random = torch.Generator().manual_seed(0)
    raw = 0.1 * torch.randn(rows, 4 * recipe.segment_samples, generator=random)
    return Batch(raw, torch.arange(rows) % 2, 7)


def told(module: CycleObjective) -> dict[str, Any]:
    """What a step logs, with the module free of a trainer."""
    values: dict[str, Any] = {}

    def keep(more: Any, value: Any = None, **_: Any) -> None:
        values.update({more: value} if isinstance(more, str) else more)

    module._trainer = SimpleNamespace(world_size=1, global_step=0)  # pyright: ignore[reportAttributeAccessIssue]
    module.log = module.log_dict = keep  # pyright: ignore[reportAttributeAccessIssue]
    return values


@given(size=st.integers(0, 5), calls=st.integers(1, 6), rows=st.integers(1, 4))
def test_the_pool_keeps_so_many_and_gives_what_it_got(size: int, calls: int, rows: int) -> None:
    pool, random, seen = FakePool(size), torch.Generator().manual_seed(0), set()
    for call in range(calls):
        number = torch.arange(rows) + call * rows
        seen |= set(number.tolist())
        given_back = pool.exchange(Fakes(number[:, None].float().requires_grad_(), number % 2), random)
        assert given_back.audio.shape == (rows, 1) and not given_back.audio.requires_grad
        numbers = given_back.audio[:, 0].long()
        assert set(numbers.tolist()) <= seen and torch.equal(given_back.style, numbers % 2)
        assert len(pool.kept) == min(size, (call + 1) * rows)


def test_a_full_pool_gives_the_past_about_half_of_the_time() -> None:
    pool, random = FakePool(50), torch.Generator().manual_seed(0)
    past = 0
    for call in range(100):
        number = torch.arange(20) + 20 * call
        past += int((pool.exchange(Fakes(number[:, None].float(), number), random).audio[:, 0] < 20 * call).sum())
    assert 0.4 < past / 2000 < 0.55


def test_noise_is_the_end_of_a_vector_and_not_in_the_table(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    module = CycleObjective(recipe, {})
    assert not module.styles.weight[:, -2:].any() and module.styles.weight[:, :-2].all()
    style, random = torch.zeros(400, dtype=torch.long), torch.Generator().manual_seed(0)
    vectors = module.vectors(style, random).detach()
    torch.testing.assert_close(vectors[:, :-2], module.styles(style).detach()[:, :-2])
    plain = (vectors[:, -2:] == 0).all(dim=1)
    assert 0.18 < float(plain.float().mean()) < 0.32
    assert 0.85 < float(vectors[~plain][:, -2:].std()) < 1.15
    module.vectors(style, random).square().sum().backward()
    assert not module.styles.weight.grad[:, -2:].any()  # pyright: ignore[reportOptionalSubscript]
    with torch.no_grad():
        learned = {name: torch.ones_like(value) for name, value in module.state_dict().items()}
    card = {"styles": [{"id": entry.id} for entry in recipe.style], "recordings": {}}
    module.begin_with(Beginning(tmp_path / "other.ckpt", learned, card))
    assert not module.styles.weight[:, -2:].any() and bool((module.styles.weight[:, :-2] == 1.0).all())


def test_a_step_goes_there_and_back_and_teaches_generator_and_critic(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    module = CycleObjective(recipe, {})
    values, passes = told(module), []
    restore = module.restore

    def noted(audio: Tensor, vectors: Tensor) -> Any:
        passes.append((audio, vectors, restore(audio, vectors)))
        return passes[-1][2]

    module.restore = noted  # pyright: ignore[reportAttributeAccessIssue]
    module.training_step(batch(recipe), 0).backward()
    there, back, same = passes
    assert back[0] is there[2][0]  # what came out goes back in
    own = module.styles(torch.tensor([0, 1, 0, 1]))[:, :-2]
    torch.testing.assert_close(there[1][:, :-2], own.roll(1, dims=0))
    torch.testing.assert_close(back[1][:, :-2], own)
    torch.testing.assert_close(same[0], there[0])
    expected = 2.0 * values["train/cycle"] + values["train/identity"] + values["train/level"]
    assert float(values["train/loss"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for part in (module.generator.leave, module.critic):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


@pytest.mark.parametrize(
    ("changes", "text", "complaint"),
    [
        ([], "", "adversary.weight: the objective 'cycle' needs a critic"),
        (["cycle.noise_dims=4"], CYCLE, r"cycle.noise_dims: must be below model.style_dim \(4\), got 4"),
        (["data.segments_in_a_row=2"], CYCLE, "the objective 'cycle' has no encoder, phrases or segments in a row"),
        (["cycle.pool_size=-1"], CYCLE, "cycle.pool_size: must be at least 0, got -1"),
    ],
)
def test_what_a_cycle_cannot_be(tmp_path: Path, changes: list[str], text: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        recipe_in(tmp_path, *changes, text=text)
