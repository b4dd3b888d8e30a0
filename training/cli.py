"""``restyle data``: recordings -> what they are; ``train``: recordings -> checkpoint; ``evaluate``: model file ->
figures; ``learn``: clip -> style file."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

if TYPE_CHECKING:
    from training.library import Library
    from training.phrases import PhraseBank
    from training.recipe import Recipe
    from training.tunes import TuneLibrary


MOST_REMARKS = 20
MUSICNET_SPLITS = ("train", "test")
MUSICNET_GROUPINGS = ("composer", "ensemble", "instrument")


def data(
    folder: Annotated[Path, typer.Argument(help="Folder with a folder of recordings per style, or MusicNet.")],
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures to this file; - prints them.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw minutes, loudness, lengths and spectra per style to this PNG.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Where decoded recordings are kept.")] = Path(".restyle-cache"),
    as_styles: Annotated[
        str | None,
        typer.Option(help=f"Make style folders of MusicNet, one per: {', '.join(MUSICNET_GROUPINGS)}; needs --out."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --as-styles: the new folder of styles.")] = None,
    split: Annotated[str, typer.Option(help="With --as-styles: MusicNet's own train or test recordings.")] = "train",
) -> None:
    """What recordings are there: minutes, rates, clipped, silent, damaged, copies; or styles made of MusicNet.

    Example: restyle data recordings --plot recordings.png
    """
    errors = Console(stderr=True)
    console = errors if json_path == Path("-") else Console()
    if as_styles is not None and as_styles not in MUSICNET_GROUPINGS:
        raise typer.BadParameter(
            f"must be {', '.join(MUSICNET_GROUPINGS)}, got '{as_styles}'", param_hint="--as-styles"
        )
    if split not in MUSICNET_SPLITS:
        raise typer.BadParameter(f"must be {' or '.join(MUSICNET_SPLITS)}, got '{split}'", param_hint="--split")
    if (as_styles is None) != (out is None):
        raise typer.BadParameter("--as-styles and --out need each other")
    if as_styles is not None and plot is not None:
        raise typer.BadParameter("not with --as-styles; survey the new folder afterwards", param_hint="--plot")
    try:
        from realtime.files import NewFile
        from realtime.spectral import SpectralSpec
        from training.musicnet import MusicNetError, is_musicnet, read_musicnet, write_styles
        from training.survey import SurveyError, draw_survey, survey_folder, survey_table
    except ModuleNotFoundError as error:
        errors.print(f"[red]'data' needs {error.name}[/]; install it with: pip install 'restyle\\[training]'")
        raise typer.Exit(1) from None
    to_file = None if json_path == Path("-") else json_path
    _check_targets(errors, to_file, plot)
    try:
        with Progress(console=errors, transient=True) as progress:
            tell = _teller(progress)
            if as_styles is not None and out is not None:
                found = read_musicnet(folder)
                made = write_styles(
                    found, as_styles, out, split, progress=lambda done, of: tell("making styles", done, of)
                )
                remarks = [f"{item.path}: {item.reason}" for item in made.skipped]
                values = made.as_dict()
                table = Table("style", "MIDI program", "recordings", "minutes", box=None, pad_edge=False)
                for style in made.styles:
                    cells = (str(style.midi_program), str(style.recordings), f"{style.seconds / 60:.1f}")
                    table.add_row(escape(style.label), *cells)
                recipes = [made.recipe, *([made.compose_recipe] if made.compose_recipe else [])]
                ending = "next: " + ", or ".join(f"restyle train {shlex.quote(str(recipe))}" for recipe in recipes)
            else:
                survey = survey_folder(folder, cache, SpectralSpec().sample_rate, progress=tell)
                every = [item for style in survey.styles for item in style.recordings]
                remarks = [f"{item.name}: {remark}" for item in every for remark in item.remarks()]
                values, table = survey.as_dict(), survey_table(survey)
                ending = ""
                if is_musicnet(folder):
                    ending = f"this is MusicNet: restyle data {shlex.quote(str(folder))} --as-styles composer --out DIR"
                if plot:
                    with NewFile(plot) as part:
                        draw_survey(part, survey)
        text = json.dumps(values, indent=1, allow_nan=False)
        if to_file:
            with NewFile(to_file) as part:
                part.write_text(text + "\n", encoding="utf-8")
    except (SurveyError, MusicNetError, OSError) as error:
        errors.print("[red]cannot read the data:[/] ", end="")
        errors.print(str(error), soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(1) from None
    if json_path == Path("-"):
        print(text)
    console.print(table)
    for remark in remarks[:MOST_REMARKS]:
        console.print(f"[yellow]remark:[/] {escape(remark)}", soft_wrap=True, highlight=False)
    if len(remarks) > MOST_REMARKS:
        console.print(f"and {len(remarks) - MOST_REMARKS} more remarks; --json FILE has them all", highlight=False)
    for warning in values.get("warnings", ()):
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True, highlight=False)
    if ending:
        console.print(ending, soft_wrap=True, highlight=False, markup=False)


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
    begin_with: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE|NAME",
            help="A new run begins with what this checkpoint, model file or shipped model learned, styles by id.",
        ),
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Instead of what the recipe says; repeat.")
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="A few steps of a small run, to try the whole path: minutes, and no sound.")
    ] = False,
    max_minutes: Annotated[float | None, typer.Option(min=0.0, help="Stop after this time, with a checkpoint.")] = None,
    accelerator: Annotated[str, typer.Option(help="Lightning: auto, cpu, gpu, ...")] = "auto",
    devices: Annotated[str, typer.Option(help="Lightning: how many, or which.")] = "auto",
    num_nodes: Annotated[int, typer.Option(min=1, help="Lightning: how many hosts.")] = 1,
    strategy: Annotated[str, typer.Option(help="Lightning: auto, ddp, ...")] = "auto",
    precision: Annotated[str, typer.Option(help="Lightning: 32-true, bf16-mixed, ...")] = "32-true",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON; no progress bar.")] = False,
) -> None:
    """Train styles from folders of recordings, or a composer from MIDI files; interrupted, the same command goes on.

    Example: restyle train training/recipes/first.toml --data recordings --max-minutes 60
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    console = Console(stderr=as_json)
    try:
        from lightning.pytorch.utilities import rank_zero_only

        from training.beginning import load_beginning
        from training.checkpoint import CheckpointError
        from training.library import LibraryError, load_library
        from training.objectives.objective import TrainingError
        from training.phrases import PhraseError, render_phrases
        from training.recipe import RecipeError, load_recipe, quick_look
        from training.train import RunOptions, prepare_teachers, read_judges, resume_point, run_training, set_aside
        from training.tunes import TunesError, load_tunes
    except ModuleNotFoundError as error:
        console.print(f"[red]training needs {error.name}[/]; install it with: pip install 'restyle\\[training]'")
        raise typer.Exit(1) from None
    leads = not getattr(rank_zero_only, "rank", 0)  # of several processes only the first speaks
    console.quiet = not leads
    try:
        plan = load_recipe(recipe, changes or ())
        if fast:
            plan = quick_look(plan)
        folder = out or Path("runs") / plan.name
        options = RunOptions(
            out_folder=folder,
            fresh=fresh,
            begin_with=begin_with,
            max_minutes=max_minutes,
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            precision=precision,
            progress=leads and not as_json,
        )
        checkpoint, done = resume_point(plan, options)
        read_judges(plan)  # what is missing is said before the recordings are read
        if begin_with and not checkpoint:
            load_beginning(begin_with)
        phrases = teachers = None
        with console.status("reading recordings") as status:
            if plan.composes:
                library = load_tunes(
                    plan.style,
                    data or recipe.parent,
                    plan.tunes,
                    plan.data.split_seed,
                    lambda at, of: status.update(f"reading tunes: {at} of {of}"),
                )
            else:
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
                teachers = prepare_teachers(
                    plan, library, cache, lambda what, at, of: status.update(f"{what}: {at} of {of}"), phrases
                )
        _describe(console, plan, library, phrases)
        if teachers:
            for name, share in teachers.known.items():
                console.print(f"{name} knows {share:.0%} of phrases that it never heard", highlight=False)
        if checkpoint:
            console.print(f"goes on from step {done} of {plan.trainer.steps} in {checkpoint}", markup=False)
        elif begin_with:
            console.print(f"begins with {begin_with}", markup=False)
        if fresh and leads:
            set_aside(folder)
        result = run_training(plan, library, options, phrases, teachers)
    except (RecipeError, LibraryError, PhraseError, TunesError, CheckpointError, TrainingError, OSError) as error:
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
    metrics = result.metrics
    if plan.composes and metrics:
        _show_perplexities(console, metrics)
    elif "validation/unchanged" in metrics:
        loss, unchanged = metrics["validation/loss"], metrics["validation/unchanged"]
        console.print(f"validation loss {loss:.4f} (input unchanged: {unchanged:.4f})")
        if "validation/style_recognised" in metrics:
            share = metrics["validation/style_recognised"]
            console.print(f"style recognised in {share:.1%} of recordings played in another style", highlight=False)
    elif "validation/accuracy" in metrics:
        accuracy, error = metrics["validation/accuracy"], metrics["validation/expected_calibration_error"]
        console.print(f"validation accuracy {accuracy:.1%}, expected calibration error {error:.3f}")
    if result.ended_by != "steps":
        console.print("the same command goes on from here")
    best = result.best_checkpoint or result.last_checkpoint
    console.print(f"next: restyle export {best} {plan.name}.onnx", soft_wrap=True, markup=False)


def _show_perplexities(console: Console, metrics: dict[str, float]) -> None:
    """Held-out perplexity per event, the model's beside the baselines'."""
    table = Table("held out", "perplexity per event", "unigram", "3 events back", "12 events back", "per note")
    for split in ("validation", "test"):
        names = ("perplexity", "unigram_perplexity", "markov_3_perplexity", "markov_12_perplexity")
        cells = [*names, "perplexity_per_note"]
        table.add_row(split, *(f"{metrics[f'{split}/{name}']:.3f}" for name in cells))
    console.print(table)


def _describe(console: Console, recipe: Recipe, library: Library | TuneLibrary, phrases: PhraseBank | None) -> None:
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
        console.print(f"{len(library.skipped)} {'tunes' if recipe.composes else 'recordings'} skipped")


def _teller(progress: Progress) -> Callable[[str, int, int], None]:
    """What long work tells (what is done, so much, of so much), as one bar each."""
    bars: dict[str, TaskID] = {}

    def tell(what: str, done: int, of: int) -> None:
        if what not in bars:
            bars[what] = progress.add_task(what, total=of)
        progress.update(bars[what], completed=done, total=of)

    return tell


def _check_targets(errors: Console, *targets: Path | None) -> None:
    """Exit 1, before long work, where one of the files that it ends in cannot be written."""
    from realtime.files import check_writable

    for target in targets:
        if target is None:
            continue
        try:
            check_writable(target)
        except OSError as error:
            why = f"{target}: {error.strerror}" if target.parent.is_dir() else f"{target}: there is no folder"
            errors.print(f"[red]cannot write:[/] {escape(why)}", soft_wrap=True)
            raise typer.Exit(1) from None


def evaluate(
    model: Annotated[Path, typer.Argument(help="The model file to judge, or the name of a shipped one.")],
    inputs: Annotated[Path, typer.Option(help="Folder of recordings to restyle, which no model was trained on.")],
    references: Annotated[Path, typer.Option(help="Folder with a folder of real recordings per style, named its id.")],
    styles: Annotated[str | None, typer.Option(help="Only these: violin,choir; default: all of the model.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Another model to compare with; default: the first one that was shipped.")
    ] = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="Beside the input unchanged only: half the time, for a look in between.")
    ] = False,
    tunes: Annotated[
        Path | None, typer.Option(help="Folder of MIDI files that the references play, too: what real notes reach.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="How much of each input is used: its loudest part.")] = 10.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy, confusions and spectrograms to this PNG.")] = None,
    seed: Annotated[int, typer.Option(help="Of the recogniser's training and its held-out recordings.")] = 0,
    cache: Annotated[Path, typer.Option(help="Where decoded recordings and the recogniser are kept.")] = Path(
        ".restyle-cache"
    ),
    provider: Annotated[str, typer.Option(help="cpu, cuda or tensorrt.")] = "cpu",
) -> None:
    """Style, playing and cleanliness of a model's sound, beside the input unchanged, a fixed filter and another model.

    Example: restyle evaluate violin.onnx --inputs recordings/unseen --references recordings/styles --json figures.json
    """
    console, errors = Console(), Console(stderr=True)
    try:
        from realtime.bundle import BundleError, ProviderError, StyleError, named_model
        from realtime.files import NewFile
        from training.evaluate import EvaluationError, EvaluationOptions
        from training.evaluate import evaluate as run
        from training.models.recogniser import RecogniserConfig
        from training.phrases import PhraseError
        from training.report import draw, tables
    except ModuleNotFoundError as error:
        errors.print(f"[red]evaluation needs {error.name}[/]; install it with: pip install 'restyle\\[training]'")
        raise typer.Exit(1) from None
    _check_targets(errors, json_path, plot)
    if alone and baseline:
        raise typer.BadParameter("not with --baseline: alone is without one", param_hint="--alone")
    options = EvaluationOptions(
        styles=tuple(name.strip() for name in (styles or "").split(",") if name.strip()),
        baseline=named_model(baseline) if baseline else None,
        alone=alone,
        tunes=tunes,
        seconds=seconds,
        provider=provider,
        cache=cache,
        recogniser=RecogniserConfig(seed=seed),
    )
    try:
        with Progress(console=errors, transient=True) as progress:
            tell = _teller(progress)
            result = run(named_model(model), inputs, references, options, tell)
        if json_path:
            with NewFile(json_path) as part:
                part.write_text(json.dumps(result.figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if plot:
            with NewFile(plot) as part:
                draw(part, result)
    except (EvaluationError, PhraseError, BundleError, StyleError, ProviderError, OSError) as error:
        errors.print("[red]cannot evaluate:[/] ", end="")
        errors.print(str(error), soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(1) from None
    figures = result.figures
    for skipped in figures["skipped"]:
        errors.print(f"[yellow]skipped:[/] {escape(skipped)}", soft_wrap=True, highlight=False)
    for table in tables(figures):
        console.print(table, "")
    pitched = [name for name, used in figures["inputs_used"].items() if used["pitched"]]
    console.print(
        f"pitch is measured on the {len(pitched)} of {len(figures['inputs_used'])} inputs that are one voice with a "
        f"pitch: {', '.join(pitched) or 'none'}",
        soft_wrap=True,
        highlight=False,
    )
    for style in figures["recogniser"]["weak_styles"]:
        right = figures["recogniser"]["styles"][style]["phrases"]
        errors.print(
            f"[yellow]warning:[/] the recogniser knows only {right:.0%} of real {style} it has not heard; "
            "its word on this style is worth as much: add recordings",
            soft_wrap=True,
        )
    console.print(f"{figures['wall_seconds'] / 60:.1f} minutes on {figures['machine']}", highlight=False)


def learn(
    clip: Annotated[Path, typer.Argument(help="Sound file of the style: a minute of playing is best.")],
    name: Annotated[str, typer.Option(help="What the style is called, on screen and in --style.")],
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Model file; default: the shipped one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Style file; default: <name>.style in this folder.")] = None,
    program: Annotated[
        int | None, typer.Option(min=0, max=127, help="MIDI program that selects it; default: the first free one.")
    ] = None,
    refine: Annotated[
        float | None,
        typer.Option(min=0.0, help="Minutes to come nearer to the clip in; 0: as heard. Default: one step of it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """A new style from a clip, without training: a small file that 'live' and 'render' take with --learned.

    Example: restyle learn cello.wav --name Cello --refine 3
    """
    from realtime.audio import AudioFileError
    from realtime.bundle import BundleError, named_model, read_bundle
    from realtime.files import check_writable
    from realtime.learned import SUFFIX, LearnError, read_clip, style_id, write_style
    from realtime.learned import learn as hear
    from realtime.refine import SHORTEST_CLIP_S
    from realtime.refine import refine as come_nearer

    errors = Console(stderr=True)
    try:
        bundle = read_bundle(named_model(model))
        target = out or Path(style_id(name) + SUFFIX)
        if target.suffix != SUFFIX:
            raise LearnError(f"{target}: a style file ends in {SUFFIX}; choose another --out")
        if target.exists():
            raise LearnError(f"{target}: is there already; choose another --name or --out, or remove it")
        try:
            check_writable(target)
        except OSError as error:
            raise LearnError(f"{target}: cannot be written ({error.strerror}); choose another --out") from None
        learned = hear(bundle, clip, name, program)
        audio = read_clip(clip, rate := bundle.manifest.spectral.sample_rate)
        if refine or (refine is None and len(audio) >= SHORTEST_CLIP_S * rate):
            with Progress(console=errors, transient=True, disable=as_json) as progress:
                bar = progress.add_task("coming nearer to the clip", total=1.0)
                learned = come_nearer(
                    bundle, learned, audio, refine or 0.0, lambda share: progress.update(bar, completed=share)
                )
        write_style(target, learned)
    except (LearnError, BundleError, AudioFileError, OSError) as error:
        errors.print("[red]cannot learn:[/] ", end="")
        errors.print(str(error), soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps({"file": str(target), **dataclasses.asdict(learned)}))
        return
    style = learned.style
    say = Console(soft_wrap=True, highlight=False, markup=False)
    say.print(f"{target}: style '{style.id}' of model '{learned.model}', MIDI program {style.program}")
    if learned.refined:
        before, after = learned.refined["distance_before"], learned.refined["distance_after"]
        say.print(f"distance to the clip, on playing that was not searched with: {before:.2f} -> {after:.2f}")
    with_model = f" --model {shlex.quote(str(model))}" if model else ""
    say.print(f"next: restyle live{with_model} --learned {shlex.quote(str(target))} --style {style.id}")
