"""``restyle recognise``: which style a recording is, and which recordings are near it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from realtime.cli import PLAIN, JsonOption, ProviderOption, failure, recogniser_file


def recognise(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Sound files, folders of them, or one of style folders.")
    ],
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="A recogniser's model file; default: the shipped one.")
    ] = None,
    nearest: Annotated[
        Path | None, typer.Option(metavar="LIBRARY", help="Rank the recordings of this folder by how near they are.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="With --nearest: how many.")] = 10,
    cache: Annotated[Path, typer.Option(help="With --nearest: where the index is kept.")] = Path(".restyle-cache"),
    with_known: Annotated[
        bool,
        typer.Option("--with-known", help="In style folders: also the recordings that the recogniser learned from."),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Of style folders: draw confusions and calibration to this PNG.")
    ] = None,
    provider: ProviderOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Which style is this: every three seconds and the whole; of a folder of style folders, how often that is right.

    Example: restyle recognise take1/input.wav --nearest recordings
    """
    from rich.progress import Progress

    from realtime.audio import AudioFileError
    from realtime.bundle import BundleError, ProviderError, read_bundle
    from realtime.files import NewFile, check_writable
    from realtime.recognise import (
        RecogniseError,
        Recogniser,
        evaluate,
        file_sha256,
        find_labelled,
        plan_recordings,
        recognise_all,
    )
    from realtime.recognise_report import (
        draw,
        evaluation_table,
        evaluation_values,
        nearest_table,
        recognition_table,
        recognition_values,
    )

    console, errors = Console(), Console(stderr=True)
    if plot is not None:
        try:
            check_writable(plot)
        except OSError as error:
            raise failure("cannot write", f"{plot}: {error.strerror}; choose another file") from None
    failed: list[str] = []
    library = labelled = evaluation = None
    try:
        recogniser = Recogniser(read_bundle(recogniser_file(model)), provider)
        styles = recogniser.manifest.styles
        if nearest is None and len(files) == 1 and files[0].is_dir():
            labelled = find_labelled(files[0], recogniser.manifest, with_known)
        if plot is not None and labelled is None:
            raise RecogniseError("--plot: draws one folder of folders that are named as styles are; give one")
        paths = [path for path, _ in labelled.recordings] if labelled else plan_recordings(files)
        with Progress(console=errors, transient=True, disable=as_json) as progress:

            def told(what: str) -> Callable[[int, int], None]:
                task = progress.add_task(what, total=None)
                return lambda done, of: progress.update(task, completed=done, total=of)

            if nearest is not None:
                library = _library(nearest, recogniser, cache)
                failed += library.update(told("hearing the library"))
            heard, problems = recognise_all(recogniser, paths, told("recognising"))
        failed += problems
        result: dict[str, Any] = {"model": recogniser.manifest.name, "failed": failed}
        if labelled:
            known = [(heard[path], number) for path, number in labelled.recordings if path in heard]
            if not known:
                raise RecogniseError(f"{files[0]}: none of its recordings can be heard ({problems[0]})")
            evaluation = evaluate(known, [style.id for style in styles])
            result |= {"left_out_known": labelled.known, "left_out_folders": list(labelled.foreign)}
            result |= evaluation_values(evaluation)
            if plot:
                with NewFile(plot) as part:
                    draw(part, evaluation, f"'{recogniser.manifest.name}' on {files[0]}")
        result["files"] = [recognition_values(heard[path], styles) for path in paths if path in heard]
        neighbours = {
            path: library.nearest(found.embedding, count, without=file_sha256(path))
            for path, found in heard.items()
            if library is not None
        }
        for values in result["files"] if library is not None else ():
            values["nearest"] = [asdict(neighbour) for neighbour in neighbours[Path(values["file"])]]
    except (BundleError, ProviderError, AudioFileError, RecogniseError, OSError) as error:
        raise failure("cannot recognise", error) from None
    if as_json:
        print(json.dumps(result))
    elif labelled and evaluation:
        console.print(evaluation_table(evaluation))
        print(
            f"{evaluation.accuracy:.1%} of {len(evaluation.right)} excerpts, {evaluation.mean_style_accuracy:.1%} in "
            f"the mean of styles, {evaluation.recordings_right} of {evaluation.recordings} whole recordings; expected "
            f"calibration error {evaluation.calibration_error:.3f}"
        )
        if labelled.known:
            print(f"{labelled.known} recordings that it learned from are left out; --with-known takes them in")
        for name in labelled.foreign:
            console.print(f"left out: {name}, no style of '{recogniser.manifest.name}'", **PLAIN)
    else:
        for path, found in heard.items():
            console.print(recognition_table(found, styles))
            if library is not None:
                console.print(nearest_table(found, neighbours[path]))
    for problem in failed:
        errors.print("[yellow]skipped:[/] ", end="")
        errors.print(problem, **PLAIN)
    if failed or not heard:
        raise typer.Exit(1)


def _library(folder: Path, recogniser: Any, cache: Path) -> Any:
    """The index of a folder's recordings. Raises RecogniseError, also where faiss is not installed."""
    from realtime.recognise import RecogniseError

    try:
        from realtime.nearest import RecordingLibrary
    except ModuleNotFoundError as error:
        raise RecogniseError(f"--nearest needs {error.name}; install it with: pip install 'restyle[nearest]'") from None
    return RecordingLibrary(folder, recogniser, cache)
