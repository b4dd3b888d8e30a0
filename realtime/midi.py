"""MIDI messages: decoding, files of them, and the map from messages to the performance."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path

import dacite

from realtime.controls import PARAMETERS, SOURCE_PARAMETERS, Performer

logger = logging.getLogger(__name__)


class MidiError(RuntimeError):
    """A MIDI port, file or map that cannot be used; the text lists what there is or names the field."""


@dataclass(frozen=True)
class Message:
    """One channel message; ``data`` has the number of bytes that its kind has in ``KINDS``."""

    kind: str
    channel: int
    data: tuple[int, ...]


KINDS: dict[int, tuple[str, int]] = {
    0x8: ("note_off", 2),
    0x9: ("note_on", 2),
    0xA: ("key_pressure", 2),
    0xB: ("control_change", 2),
    0xC: ("program_change", 1),
    0xD: ("channel_pressure", 1),
    0xE: ("pitch_bend", 2),
}
"""High four bits of the status byte -> kind and number of data bytes (MIDI 1.0 Detailed Specification, table 1)."""


def decode(data: Sequence[int]) -> Message | None:
    """One whole message as a driver delivers it -> Message; None for system messages and garbage, never an error."""
    if not data or not 0x80 <= data[0] < 0xF0:
        return None
    kind, size = KINDS[data[0] >> 4]
    if len(data) != 1 + size or any(not 0 <= byte <= 0x7F for byte in data[1:]):
        return None
    values = tuple(int(byte) for byte in data[1:])
    if kind == "note_on" and values[1] == 0:
        kind = "note_off"
    return Message(kind, data[0] & 0x0F, values)


def encode(message: Message) -> bytes:
    """The bytes of a channel message; the inverse of ``decode``."""
    status = next(high for high, (kind, _) in KINDS.items() if kind == message.kind)
    return bytes([status << 4 | message.channel, *message.data])


SUSTAIN_PEDAL, ALL_SOUND_OFF, RESET_CONTROLLERS, ALL_NOTES_OFF = 64, 120, 121, 123
DEFAULT_CONTROLLERS = {
    "morph": 1,
    "output_gain_db": 7,
    "dry_wet": 12,
    "input_gain_db": 13,
    "intensity": 11,
    "drone": 69,
}


@dataclass(frozen=True)
class MidiMap:
    """Which message moves what. ``channel`` -1 listens to all; controllers map parameter id -> number, -1 for none.

    ValueError names a field that is wrong.
    """

    channel: int = -1
    first_note: int = 36
    second_style_controller: int = 3
    controllers: dict[str, int] = field(default_factory=lambda: dict(DEFAULT_CONTROLLERS))

    def __post_init__(self) -> None:
        known = [parameter.id for parameter in (*PARAMETERS, *SOURCE_PARAMETERS)]
        for name in self.controllers:
            if name not in known:
                raise ValueError(f"controllers.{name}: is no parameter; {_near(name, known)}")
        numbers = {"second_style_controller": self.second_style_controller}
        numbers |= {f"controllers.{name}": number for name, number in self.controllers.items()}
        taken: dict[int, str] = {}
        for name, number in numbers.items():
            if not -1 <= number < ALL_SOUND_OFF:
                raise ValueError(f"{name}: controller {number} is outside 0..{ALL_SOUND_OFF - 1} (-1 for none)")
            if number == SUSTAIN_PEDAL:
                raise ValueError(f"{name}: controller {number} is the sustain pedal's; choose another")
            if number in taken:
                raise ValueError(
                    f"{name}: controller {number} is that of {taken[number]} already; "
                    f"give one of them another number, or -1 for none"
                )
            if number >= 0:
                taken[number] = name
        if not -1 <= self.channel <= 15:
            raise ValueError(f"channel: {self.channel} is outside 0..15 (-1 for all)")
        if not 0 <= self.first_note <= 127:
            raise ValueError(f"first_note: {self.first_note} is outside 0..127")

    @classmethod
    def load(cls, path: Path) -> MidiMap:
        """Read a TOML map; what it leaves out, each controller included, keeps its default. MidiError names the key."""
        try:
            values = tomllib.loads(path.read_text("utf-8"))
            keys = [known.name for known in fields(cls)]
            for key in values:
                if key not in keys:
                    raise ValueError(f"{key}: is no key of a map; {_near(key, keys)}")
            if isinstance(values.get("controllers"), dict):
                values["controllers"] = DEFAULT_CONTROLLERS | values["controllers"]
            return dacite.from_dict(cls, values, dacite.Config(strict=True))
        except FileNotFoundError:
            raise MidiError(f"{path}: there is no such file; check the path") from None
        except (OSError, ValueError, dacite.DaciteError) as error:
            raise MidiError(f"{path}: {error}") from None


def _near(wanted: str, known: Sequence[str]) -> str:
    """What to write instead, for a message."""
    near = get_close_matches(wanted, known, n=2, cutoff=0.5)
    return (f"did you mean {' or '.join(near)}? " if near else "") + f"there are: {', '.join(known)}"


def apply(message: Message, performer: Performer, midi_map: MidiMap) -> bool:
    """Let a message act on the performance; True if it meant something. Any message is safe at any time.

    Program change selects; held notes blend, weighted by velocity, the styles of the model's list from
    ``first_note`` upwards, round and round; controllers move parameters over their range, 64 being the default of
    those that go both ways.
    """
    if midi_map.channel not in (-1, message.channel):
        return False
    match message.kind, message.data:
        case "program_change", (program,):
            style = performer.style_of_program(program)
            if style is None:
                return False
            performer.select(style.id)
        case "note_on", (note, velocity):
            styles = performer.manifest.styles
            performer.hold(note, styles[(note - midi_map.first_note) % len(styles)], velocity)
        case "note_off", (note, _):
            performer.release(note)
        case "control_change", (number, value):
            return _control(number, value, performer, midi_map)
        case _:
            return False
    return True


def _control(number: int, value: int, performer: Performer, midi_map: MidiMap) -> bool:
    if number == SUSTAIN_PEDAL:
        performer.pedal(value >= 64)
        return True
    if number in (ALL_SOUND_OFF, ALL_NOTES_OFF):
        performer.release_all()
        return True
    if number == RESET_CONTROLLERS:
        performer.pedal(False)
        performer.release_all()
        return True
    if number == midi_map.second_style_controller:
        style = performer.style_of_program(value)
        if style is not None:
            performer.select_second(style.id)
        return style is not None
    for parameter_id, controller in midi_map.controllers.items():
        if controller == number and parameter_id in performer.parameters:
            performer.set(parameter_id, controller_value(value, performer, parameter_id))
            return True
    return False


def controller_value(value: int, performer: Performer, parameter_id: str) -> float:
    """0..127 -> the parameter's range; where the default lies inside the range, 64 is the default."""
    parameter = performer.parameters[parameter_id]
    low, middle, high = parameter.minimum, parameter.default, parameter.maximum
    if not low < middle < high:
        return low + (high - low) * value / 127
    if value <= 64:
        return low + (middle - low) * value / 64
    return middle + (high - middle) * (value - 64) / 63


def read_midi_file(path: Path) -> list[tuple[float, bytes]]:
    """Channel messages of a standard MIDI file as (seconds from the start, bytes), in order. Raises MidiError."""
    import mido

    if not path.is_file():
        raise MidiError(f"{path}: there is no such file; check the path")
    try:
        events, seconds = [], 0.0
        for message in mido.MidiFile(str(path)):
            seconds += message.time
            if not message.is_meta and message.type != "sysex":
                events.append((seconds, bytes(message.bytes())))
    except Exception as error:
        raise MidiError(f"{path}: is not a standard MIDI file ({error or type(error).__name__})") from None
    return events
