"""restyle's engine: a model file in, a plugin out. Importing it costs next to nothing; names load when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realtime.bundle import Bundle, BundleError, read_bundle
    from realtime.controls import Controls, Performer
    from realtime.ensemble import Part, Parts, join
    from realtime.processor import Processor
    from realtime.stream import Stream

_HOMES = {
    "Bundle": "bundle",
    "BundleError": "bundle",
    "read_bundle": "bundle",
    "Controls": "controls",
    "Performer": "controls",
    "Part": "ensemble",
    "Parts": "ensemble",
    "join": "ensemble",
    "Processor": "processor",
    "Stream": "stream",
}

__all__ = [
    "Bundle",
    "BundleError",
    "Controls",
    "Part",
    "Parts",
    "Performer",
    "Processor",
    "Stream",
    "join",
    "read_bundle",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'realtime' has no attribute '{name}'")
    return getattr(import_module(f"realtime.{_HOMES[name]}"), name)
