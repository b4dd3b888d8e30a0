"""``restyle train``: folders of recordings -> checkpoint."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from training.library import Library
    from training.phrases import PhraseBank
    from training.recipe import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="TOML recipe: styles, model, losses, length.")],
    data: Annotated[
        Path | None, typer.Option(help="Parent of the style folders; default: the recipe's folder.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/<recipe name>.")] = None,
    cache: Annotated[Path, typer.Option(help="Where decoded recordings are kept.")] = Path(".restyle-cache"),
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Start anew, or go on from the last checkpoint.")
    ] = False,
    max_minutes: Annotated[float | None, typer.Option(min=0.0, help="Stop after this time, with a checkpoint.")] = None,
    accelerator: Annotated[str, typer.Option(help="Lightning: auto, cpu, gpu, ...")] = "auto",
    devices: Annotated[str, typer.Option(help="Lightning: how many, or which.")] = "auto",
    num_nodes: Annotated[int, typer.Option(min=1, help="Lightning: how many hosts.")] = 1,
    strategy: Annotated[str, typer.Option(help="Lightning: auto, ddp, ...")] = "auto",
    precision: Annotated[str, typer.Option(help="Lightning: 32-true, bf16-mixed, ...")] = "32-true",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON; no progress bar.")] = False,
) -> None:
    """Train styles from folders of recordings; interrupted at any moment, the same command goes on.

    Example: restyle train training/recipes/first.toml --data recordings --max-minutes 60
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    console = Console(stderr=as_json)
    try:
        from lightning.pytorch.utilities import rank_zero_only

        from training.checkpoint import CheckpointError
        from training.library import LibraryError, load_library
        from training.objectives.restore import TrainingError
        from training.phrases import PhraseError, render_phrases
        from training.recipe import RecipeError, load_recipe
        from training.train import RunOptions, resume_point, run_training, set_aside
    except ModuleNotFoundError as error:
        console.print(f"[red]training needs {error.name}[/]; install it with: pip install 'restyle\\[training]'")
        raise typer.Exit(1) from None
    leads = not getattr(rank_zero_only, "rank", 0)  # of several processes only the first speaks
    console.quiet = not leads
    try:
        plan = load_recipe(recipe)
        folder = out or Path("runs") / plan.name
        options = RunOptions(
            out_folder=folder,
            fresh=fresh,
            max_minutes=max_minutes,
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            precision=precision,
            progress=leads and not as_json,
        )
        checkpoint, done = resume_point(plan, options)
        with console.status("reading recordings") as status:
            library = load_library(
                plan.style,
                data or recipe.parent,
                plan.data,
                plan.spectral.sample_rate,
                cache,
                lambda at, of: status.update(f"reading recordings: {at} of {of}"),
            )
            phrases = render_phrases(
                plan,
                library,
                data or recipe.parent,
                cache,
                lambda what, at, of: status.update(f"{what}: {at} of {of}"),
            )
        _describe(console, plan, library, phrases)
        if checkpoint:
            console.print(f"goes on from step {done} of {plan.trainer.steps} in {checkpoint}", markup=False)
        if fresh and leads:
            set_aside(folder)
        result = run_training(plan, library, options, phrases)
    except (RecipeError, LibraryError, PhraseError, CheckpointError, TrainingError, OSError) as error:
        console.print("[red]cannot train:[/] ", end="")
        console.print(str(error), soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(1) from None
    if not leads:
        return
    if as_json:
        values = dataclasses.asdict(result)
        print(json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in values.items()}))
        return
    ending = {"steps": "done", "time": "stopped: time is over", "signal": "stopped by a signal"}[result.ended_by]
    console.print(f"{ending}: step {result.steps} of {plan.trainer.steps}, {result.wall_seconds / 60:.1f} minutes")
    if "validation/loss" in result.metrics:
        loss, unchanged = result.metrics["validation/loss"], result.metrics["validation/unchanged"]
        console.print(f"validation loss {loss:.4f} (input unchanged: {unchanged:.4f})")
    if result.ended_by != "steps":
        console.print("the same command goes on from here")
    best = result.best_checkpoint or result.last_checkpoint
    console.print(f"next: restyle export {best} {plan.name}.onnx", soft_wrap=True, markup=False)


def _describe(console: Console, recipe: Recipe, library: Library, phrases: PhraseBank | None) -> None:
    table = Table("style", "minutes", "train", "validation", "test", *(["minutes of phrases"] if phrases else []))
    for row, (entry, style) in enumerate(zip(recipe.style, library.styles, strict=True)):
        everything = (*style.train, *style.validation, *style.test)
        minutes = sum(recording.seconds for recording in everything) / 60
        table.add_row(
            entry.label,
            f"{minutes:.1f}",
            *(str(len(part)) for part in (style.train, style.validation, style.test)),
            *([f"{phrases.minutes[row]:.1f}"] if phrases else []),
        )
    console.print(table)
    for warning in (*library.warnings, *(phrases.warnings if phrases else ())):
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    for skipped in library.skipped:
        console.print(f"[yellow]skipped:[/] {escape(f'{skipped.path}: {skipped.reason}')}", soft_wrap=True)
    if library.skipped:
        console.print(f"{len(library.skipped)} recordings skipped")
