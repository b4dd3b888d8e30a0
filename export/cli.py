"""``restyle export``: checkpoint -> model file."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint that 'restyle train' wrote; with --recipe, also a model file.")
    ],
    model: Annotated[Path, typer.Argument(help="The model file to write, ending in .onnx.")],
    description: Annotated[str, typer.Option(help="One line for the model card.")] = "",
    emphasis: Annotated[
        str,
        typer.Option(help="How far styles lie from their mean, times this: 1.15, or 1.15,choir=1.3; above 1 overdoes."),
    ] = "1",
    mean_with: Annotated[
        list[Path] | None,
        typer.Option(help="Another checkpoint of the run: the mean of their weights goes into the file; repeatable."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="The recipe, in place of the checkpoint's: what is not learned may differ (traits, labels)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write one model file from a checkpoint, verified against torch sample by sample, or none.

    Example: restyle export runs/first/best.ckpt violin.onnx
    """
    console = Console(stderr=as_json)
    logging.basicConfig(level=logging.ERROR)
    try:
        from export.notes import export_composer
        from export.recogniser import export_recogniser
        from export.verify import Verification, VerifyError
        from export.writer import Emphasis, EmphasisError, export_checkpoint
        from realtime.bundle import BundleError, named_model
        from realtime.files import check_writable
        from training.beginning import load_model_for_export
        from training.checkpoint import (
            CheckpointError,
            TrainedComposer,
            TrainedRecogniser,
            load_composer,
            load_for_export,
            load_recogniser,
            objective_of,
        )
        from training.recipe import RecipeError, load_recipe
    except ModuleNotFoundError as error:
        console.print(f"[red]export needs {error.name}[/]; install it with: pip install 'restyle\\[training]'")
        raise typer.Exit(1) from None
    if model.suffix != ".onnx":
        raise _refusal(console, f"{model}: a model file ends in .onnx", code=2)
    try:
        overdo = Emphasis.parse(emphasis)
    except EmphasisError as error:
        raise _refusal(console, f"--emphasis: {error}", code=2) from None
    try:
        with console.status("tracing, measuring and verifying"):
            check_writable(model)
            of_silent = {"compose": load_composer, "recognise": load_recogniser}  # which perform no styles
            given = load_recipe(recipe) if recipe is not None else None
            if named_model(checkpoint).suffix == ".onnx":
                if given is None:
                    raise _refusal(console, f"{checkpoint}: is a model file; say by which --recipe it was trained", 2)
                if given.objective in of_silent:
                    raise _refusal(console, f"--recipe: {recipe} has no styles to perform; take another one", 2)
                if mean_with:
                    raise _refusal(console, f"--mean-with: {checkpoint} is a model file and no checkpoint", 2)
                trained = load_model_for_export(checkpoint, given)
            else:
                load = of_silent.get(objective_of(checkpoint))
                for option, used in (("recipe", given), ("emphasis", overdo != Emphasis()), ("mean-with", mean_with)):
                    if used and load:
                        raise _refusal(console, f"--{option}: {checkpoint} performs no styles; leave it out", 2)
                trained = load(checkpoint) if load else load_for_export(checkpoint, *(mean_with or ()), recipe=given)
            if isinstance(trained, TrainedComposer):
                result = export_composer(trained, model, description)
                extent = f"in the logits of {result.events} events"
            elif isinstance(trained, TrainedRecogniser):
                result = export_recogniser(trained, model, description)
                extent = f"over {result.hops} hops"
            else:
                result = export_checkpoint(trained, model, description, overdo)
                extent = f"of full scale over {result.hops} hops"
    except EmphasisError as error:
        raise _refusal(console, f"--emphasis: {error}") from None
    except (CheckpointError, RecipeError, VerifyError, BundleError) as error:
        raise _refusal(console, str(error)) from None
    except OSError as error:
        raise _refusal(console, f"{model}: {error.strerror or error}; nothing was written") from None
    if as_json:
        print(json.dumps({"model": str(model), "bytes": model.stat().st_size, **asdict(result)}))
        return
    console.print(
        f"{model}: {model.stat().st_size / 1e6:.2f} MB; torch and onnxruntime agree within "
        f"{result.largest_difference:.1e} {extent}",
        soft_wrap=True,
        markup=False,
    )
    if isinstance(result, Verification) and result.without_cuda_kernel:
        console.print(
            f"warning: a GPU leaves {', '.join(result.without_cuda_kernel)} to the CPU, with two copies at every hop; "
            "say it with other operators",
            soft_wrap=True,
            markup=False,
        )


def _refusal(console: Console, why: str, code: int = 1) -> typer.Exit:
    console.print("[red]cannot export:[/] ", end="")
    console.print(why, soft_wrap=True, highlight=False, markup=False)
    return typer.Exit(code)
