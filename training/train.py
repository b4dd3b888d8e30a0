"""A training run: recordings in, checkpoints out. Lightning runs it; this file decides what it runs on.

A run directory holds ``last.ckpt`` (resumed from), ``best.ckpt`` (lowest validation loss, without a critic) and
``tensorboard/``.
Batch n of process r is a function of (seed, n, r) alone, so a resumed run goes on with the batches it has not seen.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from training.augment import raw_samples
from training.beginning import load_beginning
from training.checkpoint import (
    AtomicCheckpointIO,
    CheckpointError,
    card_and_weights,
    check_resumable,
    load_recogniser,
    objective_of,
)
from training.library import SPLITS, ExcerptSampler, Library, Recording
from training.models.classifier import Pretraining, StyleClassifier, load_or_pretrain
from training.models.listener import EARS, ListeningLesson, Material, StyleListener, load_or_teach
from training.models.recogniser import Recogniser, RecogniserConfig, is_class, load_or_train
from training.models.recogniser_judge import RecogniserJudge
from training.ngrams import perplexity, witten_bell
from training.objectives import objective_class
from training.objectives.compose import HELD_OUT
from training.objectives.objective import TrainingError
from training.objectives.restore import Batch, RestoreObjective, in_batches
from training.phrases import PhraseBank, PhraseSampler
from training.recipe import Recipe
from training.tunes import NoteBatch, TuneBatches, TuneLibrary, held_out_batches, tokenise, vocabulary_of

log = logging.getLogger(__name__)

LAST, BEST = "last", "best"
BASELINE_ORDERS = {"unigram": 0, "markov_3": 3, "markov_12": 12}
"""Events that each baseline of note composition looks back: none, three, and three whole notes."""


@dataclass(frozen=True)
class RunOptions:
    """Where a run lives and what it runs on; the second half is handed to Lightning as it is."""

    out_folder: Path
    fresh: bool = False
    begin_with: Path | None = None  # checkpoint of another run, for a run that does not go on from its own
    max_minutes: float | None = None
    accelerator: str = "auto"
    devices: str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    progress: bool = True


@dataclass(frozen=True)
class Teachers:
    """What learned from real recordings before a run: classifier and listeners, which judge in it, and a recogniser
    that only says at each validation how much it takes for the style asked for; None where the recipe wants none or
    there are too few recordings for one."""

    classifier: StyleClassifier | None
    known: dict[str, float]  # share of phrases of unheard recordings that each takes for their style, by name
    witness: Recogniser | None
    listeners: tuple[StyleListener, ...] = ()


def prepare_teachers(
    recipe: Recipe,
    library: Library,
    cache: Path,
    progress: Callable[[str, int, int], None],
    phrases: PhraseBank | None = None,
) -> Teachers | None:
    """Those of this recipe and its recordings, if it wants any; learned once and kept in ``cache``.

    ``phrases``: what ``render_phrases`` made of them, for the listeners.
    """
    adversary, rate = recipe.adversary, recipe.spectral.sample_rate
    if not adversary.pretraining_phrases:
        return None
    usual = Pretraining(phrases_per_style=adversary.pretraining_phrases, seed=recipe.trainer.seed)
    lessons = [
        replace(
            usual,
            seed=usual.seed + voice,
            attack_db=adversary.attack_db if voice >= adversary.classifiers - adversary.attacked_classifiers else 0.0,
        )
        for voice in range(adversary.classifiers)
    ]
    splits = [(style.train, (*style.validation, *style.test)) for style in library.styles]
    classifier, known = None, {}
    if lessons:
        classifier, known["the classifier"] = load_or_pretrain(splits, rate, lessons, cache, progress)
    listeners = _taught_listeners(recipe, splits, phrases, cache, progress)
    known |= {f"listener {number}": share for number, (_, share) in enumerate(listeners, 1)}
    groups = {style.id: (*style.train, *style.validation, *style.test) for style in library.styles}
    witness = None
    if recipe.adversary.witness and all(is_class(group) for group in groups.values()):
        config = RecogniserConfig(seed=recipe.trainer.seed + 1)
        witness = load_or_train(groups, config, cache, lambda done, of: progress("training the witness", done, of))
    return Teachers(classifier, known, witness, tuple(listener for listener, _ in listeners))


def _taught_listeners(
    recipe: Recipe,
    splits: Sequence[tuple[Sequence[Recording], Sequence[Recording]]],
    phrases: PhraseBank | None,
    cache: Path,
    progress: Callable[[str, int, int], None],
) -> list[tuple[StyleListener, float]]:
    """The recipe's listeners, each with what it knows; ``splits``: what each style is learned from and tested on."""
    count, phrases_per_style, taught = recipe.adversary.listeners, recipe.adversary.pretraining_phrases, []
    sampler = PhraseSampler(phrases) if phrases is not None and count else None
    material = [Material(row, *split, sampler) for row, split in enumerate(splits)]
    for number in range(count):

        def told(what: str, done: int, total: int, of: str = f" {number + 1} of {count}") -> None:
            progress(what + of, done, total)

        ear, seed = EARS[number % len(EARS)], recipe.trainer.seed + number
        lesson = ListeningLesson(ear=ear, phrases_per_style=phrases_per_style, seed=seed)
        taught.append(load_or_teach(material, recipe.spectral.sample_rate, lesson, cache, told))
    return taught


def read_judges(recipe: Recipe) -> tuple[RecogniserJudge, ...]:
    """The recognisers that the recipe names, as judges of its styles. Raises CheckpointError."""
    wanted = [style.id for style in recipe.style]
    judges = []
    for name in recipe.adversary.recognisers:
        remedy = "train one with restyle train training/recipes/recognise.toml and these [[style]] tables in it"
        if not Path(name).exists():
            raise CheckpointError(f"{name}: adversary.recognisers: there is no such checkpoint; {remedy}")
        if (objective := objective_of(Path(name))) != "recognise":
            raise CheckpointError(f"{name}: adversary.recognisers: is a run of '{objective}'; {remedy}")
        trained = load_recogniser(Path(name))
        known = [style.id for style in trained.recipe.style]
        if missing := [style for style in wanted if style not in known]:
            raise CheckpointError(f"{name}: adversary.recognisers: does not know the style '{missing[0]}'; {remedy}")
        hears, made = trained.recipe.spectral, recipe.spectral
        if hears.sample_rate != made.sample_rate:
            raise CheckpointError(
                f"{name}: adversary.recognisers: hears {hears.sample_rate} Hz and not {made.sample_rate} Hz; {remedy}"
            )
        shortest = (recipe.segment_samples - made.latency_samples) / 2.0 ** (recipe.adversary.speed_semitones / 12.0)
        if shortest < hears.hop_samples + 1:
            raise CheckpointError(
                f"{name}: adversary.recognisers: hears {hears.hop_samples} samples at a time and a segment has "
                f"{shortest:.0f} at its fastest; raise data.segment_seconds"
            )
        judges.append(RecogniserJudge(trained.recogniser, known, wanted))
    return tuple(judges)


@dataclass(frozen=True)
class RunResult:
    """How a run ended. ``ended_by``: steps, time or signal."""

    last_checkpoint: Path
    best_checkpoint: Path | None
    steps: int
    wall_seconds: float
    metrics: dict[str, float]
    ended_by: str


class TrainingBatches(IterableDataset[Batch]):
    """Endless batches from ``first_step`` on, the same whatever the number of workers; styles take turns.

    An excerpt of several segments comes back for so many steps, each time with the next segment to learn from.

    With phrases, each row is a true pair, a phrase or recordings, by chance; styles without phrases have recordings.
    """

    def __init__(
        self,
        samplers: list[ExcerptSampler],
        recipe: Recipe,
        first_step: int,
        rank: int,
        phrases: PhraseSampler | None = None,
    ) -> None:
        super().__init__()
        self.samplers, self.recipe, self.first_step, self.rank = samplers, recipe, first_step, rank
        self.phrases = phrases
        self._drawn: tuple[int, Batch] | None = None

    def batch(self, step: int) -> Batch:
        """Batch number ``step`` of this process."""
        number, segment = divmod(step, self.recipe.data.segments_in_a_row)
        if self._drawn is None or self._drawn[0] != number:
            self._drawn = number, self._draw(number)
        return self._drawn[1]._replace(segment=segment)

    def _draw(self, number: int) -> Batch:
        """Excerpts, those with this number, whole."""
        recipe = self.recipe
        random = np.random.default_rng([recipe.trainer.seed, 1, number, self.rank])
        samples = raw_samples(recipe.excerpt_samples, recipe.augment)
        count, styles = recipe.trainer.batch_size, len(self.samplers)
        turns = [random.permutation(styles) for _ in range(-(-count // styles))]
        chosen = np.concatenate(turns)[:count]
        if self.phrases is None:
            raw = np.stack([self.samplers[style].draw(samples, random) for style in chosen])
            return Batch(torch.from_numpy(raw), torch.from_numpy(chosen), int(random.integers(2**31)))
        wanted: list[NDArray[np.float32]] = []
        heard: list[NDArray[np.float32]] = []
        paired = np.zeros(count, dtype=bool)
        for row, style in enumerate(chosen.tolist()):
            kind = random.uniform() if style in self.phrases else 1.0
            if kind < recipe.phrases.pair_share and self.phrases.has_pairs(style):
                paired[row] = True
                played, answer = self.phrases.draw_pair(style, samples, random)
                heard.append(played)
                wanted.append(answer)
            elif kind < recipe.phrases.pair_share + recipe.phrases.phrase_share:
                wanted.append(self.phrases.draw(style, samples, random))
            else:
                wanted.append(self.samplers[style].draw(samples, random))
        return Batch(
            torch.from_numpy(np.stack(wanted)),
            torch.from_numpy(chosen),
            int(random.integers(2**31)),
            torch.from_numpy(paired) if heard else None,
            torch.from_numpy(np.stack(heard)) if heard else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        offset, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        step = self.first_step + offset
        while True:
            yield self.batch(step)
            step += stride


def validation_batches(library: Library, recipe: Recipe) -> list[Batch]:
    """The same excerpts at every validation and on every process; styles without such recordings are left out."""
    samples = raw_samples(recipe.excerpt_samples, recipe.augment)
    rows: list[tuple[NDArray[np.float32], int]] = []
    for number, style in enumerate(library.styles):
        if not style.validation:
            continue
        sampler = ExcerptSampler(style.validation, recipe.data)
        segments = range(recipe.trainer.validation_segments)
        rows += [(sampler.draw(samples, np.random.default_rng([2, number, k])), number) for k in segments]
    return in_batches(rows, recipe.trainer.batch_size)


def _quiet_worker(_: int) -> None:
    # Ctrl-C and a service manager's stop go to the whole process group: the main process decides, workers go with it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


class RecordingsModule(LightningDataModule):
    """Batches for Lightning; training starts where the restored run left off."""

    def __init__(self, library: Library, recipe: Recipe, phrases: PhraseBank | None = None) -> None:
        super().__init__()
        self.library, self.recipe, self.phrases = library, recipe, phrases
        # An objective that validates on something else says so.
        chosen = getattr(objective_class(recipe.objective), "validation_batches", validation_batches)
        self.validation: list[Batch] = chosen(library, recipe)

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        samplers = [ExcerptSampler(style.train, self.recipe.data) for style in self.library.styles]
        phrases = PhraseSampler(self.phrases) if self.phrases else None
        batches = TrainingBatches(samplers, self.recipe, self.trainer.global_step, self.trainer.global_rank, phrases)
        workers = self.recipe.data.workers
        return DataLoader(batches, batch_size=None, num_workers=workers, worker_init_fn=_quiet_worker)

    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.validation, batch_size=None)  # pyright: ignore[reportArgumentType]


class TunesModule(LightningDataModule):
    """Batches of notes for Lightning, the baselines of the held-out tunes, and what the model card knows of both."""

    def __init__(self, library: TuneLibrary, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.vocabulary = vocabulary_of(library, recipe.tunes)
        self.tunes = {split: tokenise(library.split(split), self.vocabulary) for split in SPLITS}
        size = recipe.trainer.batch_size
        self.validation = [held_out_batches(self.tunes[split], size) for split in HELD_OUT]

    def card(self) -> dict[str, Any]:
        """Plain values: the vocabulary, notes and baselines of the held-out splits."""
        train = [tokens[1:] for tokens in self.tunes["train"].tunes]
        baselines: dict[str, float] = {}
        for split in HELD_OUT:
            held_out = [tokens[1:] for tokens in self.tunes[split].tunes]
            for name, order in BASELINE_ORDERS.items():
                probability = witten_bell(train, held_out, order, len(self.vocabulary.tokens))
                baselines[f"{split}/{name}_perplexity"] = perplexity(probability)
        return {
            "vocabulary": dataclasses.asdict(self.vocabulary),
            "note_counts": {split: sum(self.tunes[split].note_counts) for split in SPLITS},
            "baselines": baselines,
        }

    def train_dataloader(self) -> DataLoader[NoteBatch]:
        assert self.trainer is not None
        first_step, rank = self.trainer.global_step, self.trainer.global_rank
        return DataLoader(TuneBatches(self.tunes["train"], self.recipe, first_step, rank), batch_size=None)

    def val_dataloader(self) -> list[DataLoader[NoteBatch]]:
        return [DataLoader(batches, batch_size=None) for batches in self.validation]  # pyright: ignore[reportArgumentType]


class GracefulStop(Callback):
    """Ends a run after a time, at SIGTERM or at Ctrl-C: after the current step, with a checkpoint.

    A second Ctrl-C does not wait. All processes of a run stop together.
    """

    def __init__(self, checkpoint_path: Path, max_minutes: float | None) -> None:
        self.checkpoint_path, self.max_minutes = checkpoint_path, max_minutes
        self.ended_by = "steps"
        self._asked = ""
        self._started = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del trainer, pl_module
        self._started = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._asked == "signal" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = "signal"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        del pl_module, outputs, batch, batch_idx
        if self.max_minutes is not None and time.monotonic() - self._started >= 60.0 * self.max_minutes:
            self._asked = self._asked or "time"
        stop = bool(self._asked)
        if trainer.world_size > 1:
            stop = bool(trainer.strategy.reduce_boolean_decision(stop, all=False))
        if stop and not trainer.should_stop:
            self.ended_by = self._asked or "signal"
            trainer.should_stop = True
            trainer.save_checkpoint(self.checkpoint_path)
        elif trainer.global_step >= trainer.max_steps > 0:
            trainer.should_stop = True  # Lightning then validates once more, so the figures are those of the last step


def set_aside(out_folder: Path) -> None:
    """Move what an earlier run left in a run directory into its next free ``previous-N`` folder."""
    old = [out_folder / name for name in (f"{LAST}.ckpt", f"{BEST}.ckpt", "tensorboard")]
    old = [path for path in old if path.exists()]
    if not old:
        return
    number = 1
    while (out_folder / f"previous-{number}").exists():
        number += 1
    aside = out_folder / f"previous-{number}"
    aside.mkdir()
    for path in old:
        path.rename(aside / path.name)


def resume_point(recipe: Recipe, options: RunOptions) -> tuple[Path | None, int]:
    """The checkpoint that this run goes on from, if any, and its step. Raises CheckpointError if it does not fit."""
    path = options.out_folder / f"{LAST}.ckpt"
    if options.fresh or not path.exists():
        return None, 0
    return path, check_resumable(path, recipe)


def run_training(
    recipe: Recipe,
    library: Library | TuneLibrary,
    options: RunOptions,
    phrases: PhraseBank | None = None,
    teachers: Teachers | None = None,
) -> RunResult:
    """Train until the recipe's steps are done, the time is over or a signal comes; then a checkpoint is on disk.

    ``library``: tunes where the recipe composes. ``phrases``, ``teachers``: what render_phrases and prepare_teachers
    made for this recipe and library.
    """
    resume, done = resume_point(recipe, options)
    out = options.out_folder
    out.mkdir(parents=True, exist_ok=True)
    _silence_lightning()
    seed_everything(recipe.trainer.seed, verbose=False)
    card = {"recordings": library.describe(), "skipped": [[str(s.path.name), s.reason] for s in library.skipped]}
    if phrases is not None:
        card["tunes"] = sorted({phrase.tune for phrase in phrases.phrases})
    if isinstance(library, TuneLibrary):
        data = TunesModule(library, recipe)
        card |= data.card()
    else:
        data = RecordingsModule(library, recipe, phrases)
    module = objective_class(recipe.objective)(recipe, card)
    if options.begin_with and not resume:
        module.begin_with(load_beginning(options.begin_with))
    if isinstance(module, RestoreObjective):
        module.style_judges = (*read_judges(recipe), *(teachers.listeners if teachers else ()))
    if teachers is not None:
        assert isinstance(module, RestoreObjective)
        if teachers.classifier is not None:
            module.classifier.load_state_dict(teachers.classifier.state_dict())
        module.witness = teachers.witness
    last = out / f"{LAST}.ckpt"
    stop = GracefulStop(last, options.max_minutes)
    common = {"dirpath": str(out), "auto_insert_metric_name": False, "enable_version_counter": False}
    callbacks: list[Callback] = [
        stop,
        ModelCheckpoint(filename=LAST, every_n_train_steps=recipe.trainer.checkpoint_every_steps, **common),
    ]
    # A critic's work does not show in the loss, but a witness hears it.
    witnessed = teachers is not None and teachers.witness is not None
    guide = {"monitor": "validation/style_recognised", "mode": "max"} if witnessed else {"monitor": "validation_loss"}
    has_best = bool(data.validation) and (witnessed or not recipe.adversary.weight)
    if has_best:
        callbacks.append(ModelCheckpoint(filename=BEST, **guide, **common))
    if options.progress:
        callbacks.append(TQDMProgressBar(refresh_rate=recipe.trainer.log_every_steps))
    validating: dict[str, Any] = {"limit_val_batches": 0}
    if data.validation:
        every = min(recipe.trainer.validation_every_steps, recipe.trainer.steps)
        validating = {"val_check_interval": every, "check_val_every_n_epoch": None}
    try:
        trainer = Trainer(
            accelerator=options.accelerator,
            devices=int(options.devices) if options.devices.lstrip("-").isdigit() else options.devices,
            num_nodes=options.num_nodes,
            strategy=options.strategy,
            precision=options.precision,  # pyright: ignore[reportArgumentType]
            max_steps=recipe.trainer.steps,
            max_epochs=-1,
            limit_train_batches=recipe.trainer.steps,
            gradient_clip_val=recipe.optimiser.clip_norm or None,
            log_every_n_steps=recipe.trainer.log_every_steps,
            num_sanity_val_steps=0,
            enable_progress_bar=options.progress,
            enable_model_summary=False,
            logger=TensorBoardLogger(str(out), name="tensorboard", version=""),
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
            **validating,
        )
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise TrainingError(
            f"these settings do not go together: {error}; see --accelerator, --devices, --strategy, --precision"
        ) from error
    wall_seconds, metrics = module.wall_seconds, module.metrics
    if done < recipe.trainer.steps:
        trainer.fit(module, datamodule=data, ckpt_path=str(resume) if resume else None)
        trainer.save_checkpoint(last)
        done, wall_seconds, metrics = trainer.global_step, module.wall_seconds, module.metrics
    elif resume:  # nothing is left to do
        ended, _ = card_and_weights(resume)
        wall_seconds, metrics = ended["wall_seconds"], ended["metrics"]
    best_path = out / f"{BEST}.ckpt"
    return RunResult(
        last_checkpoint=last,
        best_checkpoint=best_path if best_path.exists() and has_best else None,
        steps=done,
        wall_seconds=wall_seconds,
        metrics=metrics,
        ended_by=stop.ended_by,
    )


def _silence_lightning() -> None:
    """Lightning's hints about workers, GPUs and itself are noise beside a progress bar; errors still come through."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*",
        ".*isn't an instance of.*",
        ".*Checkpoint directory.*exists.*",
        ".*treespec.*",
        ".*ended before the epoch ended.*",  # batches are numbered, a resumed run does not repeat them
        ".*callbacks used to create the checkpoint.*",
    ):
        warnings.filterwarnings("ignore", pattern)
