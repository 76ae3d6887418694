"""Which runs a configuration of the image study means: cells of data set, architecture and seed, and axes beside."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from .. import data, models
from ..errors import InputError
from .configuration import Config

PROTOCOL = 5  # part of every run's id: raised when the same configuration would give other numbers
COPIED = ("latents", "width", "net", "steps", "batch_size", "lr", "precision")
JUDGED = ("images", "sweep_images", "pairs", "circuit_pairs", "circuit_units", "battery")
VARIABLE = (*COPIED, *JUDGED)  # the fields that an axis can vary


@dataclass(frozen=True)
class Axis:
    """`name`, a field or an option of `architecture`, takes each of `values` in the runs on `data` and `architectures`;
    everything where these are empty."""

    name: str
    values: tuple[Any, ...]
    architecture: str = ""
    data: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()

    def holds(self, name: str, architecture: str) -> bool:
        """Whether runs of this cell are varied."""
        return (
            (not self.architecture or self.architecture == architecture)
            and (not self.data or name in self.data)
            and (not self.architectures or architecture in self.architectures)
        )


def plan(config: Config, device: torch.device, sets: Mapping[str, data.Dataset]) -> list[tuple[str, dict[str, Any]]]:
    """Name and configuration of every run: everything that its numbers depend on, and nothing else.

    InputError for options and axes that are none, and where no run is left.
    """
    options = chosen_options(config)
    axes = [parsed_axis(text, config) for text in config.axes]
    runs: dict[str, dict[str, Any]] = {}
    for name, architecture in _cells(config):
        base = {
            "study": "image",
            "protocol": PROTOCOL,
            "data": name,
            "official": config.root(name) is not None,
            **({"contents": sets[name].contents} if sets[name].contents else {}),
            "architecture": architecture,
            "options": _defaults(architecture) | options.get(architecture, {}),
            **{key: getattr(config, key) for key in VARIABLE},
            "device": device.type,
        }
        for suffix, settings in _varied(base, name, architecture, axes):
            for seed in range(config.seeds):
                runs.setdefault(f"{name}-{architecture}{suffix}-s{seed}", {**settings, "seed": seed})
    chosen = [(label, run) for label, run in runs.items() if _wanted(label, config.only)]
    if not chosen:
        raise InputError(f"only: no run matches {', '.join(config.only)}; runs are named like dsprites-beta_vae-s0")
    return chosen


def chosen_options(config: Config) -> dict[str, dict[str, Any]]:
    """The options that were given, by architecture; InputError for text that is none."""
    found: dict[str, dict[str, Any]] = {}
    for text in config.options:
        name, separator, value = text.partition("=")
        architecture, _, option = name.partition(".")
        if not separator or not option or not value:
            raise InputError(f"options: expected ARCHITECTURE.OPTION=VALUE, such as beta_vae.beta=4, got {text!r}")
        _check_option("options", architecture, option)
        found.setdefault(architecture, {})[option] = _value(value)
    return found


def parsed_axis(text: str, config: Config) -> Axis:
    """The axis that a text such as "latents=4,6,16@dsprites,vae" means; InputError for one that is none."""
    definition, _, places = text.partition("@")
    name, separator, listed = definition.partition("=")
    values = tuple(_value(v) for v in listed.split(",") if v)
    if not separator or not values:
        raise InputError(
            f"axes: expected NAME=VALUE,VALUE... such as latents=4,6,16 or beta_vae.beta=1,8, got {text!r}"
        )
    architecture, _, option = name.partition(".")
    if option:
        _check_option("axes", architecture, option)
    elif name not in VARIABLE:
        raise InputError(f"axes: {name!r} is neither ARCHITECTURE.OPTION nor one of {', '.join(VARIABLE)}")
    else:
        values = tuple(getattr(config.replaced({name: value}), name) for value in values)
        for value in values:
            config.replaced({name: value}).check()
    named = [place for place in places.split(",") if place]
    unknown = [place for place in named if place not in data.names() and place not in models.names()]
    if unknown:
        raise InputError(f"axes: {unknown[0]!r} in {text!r} is neither a data set nor an architecture")
    return Axis(
        option or name,
        values,
        architecture if option else "",
        tuple(place for place in named if place in data.names()),
        tuple(place for place in named if place in models.names()),
    )


def _cells(config: Config) -> Iterator[tuple[str, str]]:
    for n, name in enumerate(config.data_sets):
        for k, architecture in enumerate(config.architectures):
            if config.coverage == "all" or n == 0 or k == 0:
                yield name, architecture


def _varied(
    base: dict[str, Any], name: str, architecture: str, axes: list[Axis]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The cell's configuration, and one for each value of an axis that holds there and differs from it."""
    yield "", base
    for axis in axes:
        if not axis.holds(name, architecture):
            continue
        for value in axis.values:
            if axis.architecture:
                varied = {**base, "options": {**base["options"], axis.name: value}}
            else:
                varied = {**base, axis.name: value}
            if varied != base:
                yield f"-{axis.name}{_text(value)}", varied


def _defaults(architecture: str) -> dict[str, Any]:
    """The architecture's options but for those that only the data can tell."""
    return {option: value for option, value in models.options(architecture).items() if value is not None}


def _wanted(label: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(label, pattern) for pattern in patterns)


def _check_option(where: str, architecture: str, option: str) -> None:
    known = models.options(architecture) if architecture in models.names() else None
    if known is None:
        raise InputError(f"{where}: {architecture!r} is no architecture; known: {', '.join(models.names())}")
    if option not in known:
        raise InputError(f"{where}: {architecture} has no option {option!r}; it has {', '.join(known) or 'none'}")


def _value(text: str) -> Any:
    """A number where it is one, else the text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool) else text


def _text(value: Any) -> str:
    """As a part of a directory's name."""
    return re.sub(r"[^\w.+-]", "_", f"{value:g}" if isinstance(value, float) else str(value))
