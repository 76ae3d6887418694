"""The command `vaecirc`: study, report, doctor. Exit code 0: done, 1: failed, 2: bad input, 130: interrupted."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import BackendError, InputError, MissingExtra, RunFailed, TrainingDiverged

USAGE = """usage: vaecirc COMMAND ...

  vaecirc study image --preset smoke|quick|standard|paper [--config FILE] [--out DIR] [--FIELD VALUE ...]
                                            train, intervene, measure, report; finished runs are skipped
  vaecirc report DIR [--open]               write DIR/report.html again from the finished runs
  vaecirc doctor                            what runs here and what does not, and why

Every command takes --json, and --help for its own options."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"study": _study, "report": _report, "doctor": _doctor}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    try:
        if arguments[0] not in commands:
            raise InputError(f"command {arguments[0]!r} is unknown; known: {', '.join(commands)}")
        code = commands[arguments[0]](arguments[1:])
        sys.stdout.flush()
        return code
    except (InputError, MissingExtra) as error:
        return _fail(error, 2)
    except (TrainingDiverged, BackendError, RunFailed) as error:
        return _fail(error, 1)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: finished steps are kept; the same command goes on from there", file=sys.stderr)
        return 130


def _fail(error: Exception, code: int) -> int:
    print(f"vaecirc: {error}", file=sys.stderr)
    return code


def _study(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-") or arguments[0] != "image":
        raise InputError(f"study: expected its name, image, got {arguments[0] if arguments else 'nothing'}")
    import tyro

    from .studies import image

    parser = argparse.ArgumentParser(prog="vaecirc study image", add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--json", action="store_true")
    known, rest = parser.parse_known_args(arguments[1:])
    base = image.Config.preset(known.preset)
    if known.config is not None:
        base = image.Config.from_file(known.config, base)
    description = f"The image study; presets: {', '.join(image.PRESETS)} (--preset), --config FILE.json, --json."
    config = tyro.cli(image.Config, args=rest, default=base, prog="vaecirc study image", description=description)
    page = image.run(config, progress=not known.json)
    if known.json:
        print(json.dumps(_summary(page, config.out)))
    return 0


def _report(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="vaecirc report", allow_abbrev=False)
    parser.add_argument("directory", type=Path, help="the --out of a study")
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    parser.add_argument("--json", action="store_true")
    known = parser.parse_args(arguments)
    from . import report

    page = report.write(known.directory)
    print(json.dumps(_summary(page, known.directory)) if known.json else page)
    if known.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
    return 0


def _summary(page: Path, directory: Path) -> dict[str, Any]:
    """What --json prints of a study: a damaged findings.json is a note on the page, and here a reason."""
    from . import report

    try:
        findings = report.findings(directory)
    except InputError as error:
        findings = {"notes": [str(error)]}
    return {"report": str(page), "runs": report.summary(directory), "findings": findings}


def _doctor(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="vaecirc doctor", allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    known = parser.parse_args(arguments)
    facts = _facts()
    if known.json:
        print(json.dumps(facts))
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title in ("versions", "machine"):
        table = Table("", "", title=title, title_justify="left", box=box.SIMPLE, show_header=False)
        for name, value in facts[title].items():
            table.add_row(name, str(value))
        console.print(table)
    table = Table(
        "op", "backend", "here", "used for", "why not", title="backends", title_justify="left", box=box.SIMPLE
    )
    for row in facts["backends"]:
        here = "yes" if row["available"] else "no"
        table.add_row(row["op"], row["backend"], here, row["chosen_for"], row["why_not"])
    console.print(table)
    return 0


def _facts() -> dict[str, Any]:
    """What `doctor` tells: versions, the machine, and the table of backends."""
    import torch

    from . import __version__, _native, _registry

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    packages = ("torch", "triton", "numpy", "scipy", "scikit-learn", "pandas", "safetensors")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    return {
        "versions": {
            "vaecirc-fast": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _native.processor(),
            "threads": torch.get_num_threads(),
            "C++ module": _native.cpp_reason() or f"built; instruction set {_native.instruction_set()}",
            "instruction sets here": ", ".join(_native.cpp().instruction_sets())
            if not _native.cpp_reason()
            else "none",
            "bfloat16 on the CPU": "yes" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "no",
            "GPU": gpu,
        },
        "backends": _registry.backends().to_dict("records"),
    }


if __name__ == "__main__":
    sys.exit(main())
