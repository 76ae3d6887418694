"""Numbers and names as a reader sees them: matching decimals, real minus signs, never a NaN."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from markupsafe import Markup, escape

NOTHING = "–"

# How a table heads its columns; a metric that is not here goes by its own name.
METRICS = {
    "reconstruction": "Reconstruction",
    "active": "Active latents",
    "mig": "MIG",
    "ces_raw": "CES, raw",
    "ces_posterior": "CES, posterior",
    "ces_resample": "CES, resample",
    "ces_z_q": "CES, moved codes",
    "ces_code_swap": "CES, code swap",
    "ces_code_neighbour": "CES, nearest codes",
    "specificity": "Specificity (image cells)",
    "circuit_q": "Circuit Q",
    "circuit_modularity": "Circuit modularity",
    "active_units": "Active latents",
    "dci_disentanglement": "DCI disentanglement",
    "dci_completeness": "DCI completeness",
    "dci_informativeness": "DCI informativeness",
    "sap": "SAP",
    "factor_vae_score": "FactorVAE score",
    "beta_vae_score": "β-VAE score",
    "modularity": "Modularity",
    "explicitness": "Explicitness",
    "irs": "IRS",
    "gaussian_total_correlation": "Total correlation, Gaussian",
    "wasserstein_correlation": "Wasserstein correlation",
    "wasserstein_correlation_normalised": "Wasserstein correlation, normalised",
    "mean_pairwise_mi": "Mean pairwise MI",
}
_MODELS = {
    "vae": "VAE",
    "beta_vae": "β-VAE",
    "annealed_vae": "Annealed VAE",
    "factor_vae": "FactorVAE",
    "beta_tcvae": "β-TCVAE",
    "dip_vae_i": "DIP-VAE-I",
    "dip_vae_ii": "DIP-VAE-II",
    "vq_vae": "VQ-VAE",
}
_DATA = {
    "dsprites": "dSprites",
    "digits": "Digits",
    "shapes3d": "3D Shapes",
    "shapes3d_like": "3D-Shapes-like",
    "mpi3d": "MPI3D",
    "mpi3d_like": "MPI3D-like",
    "smallnorb": "SmallNORB",
    "norb_like": "NORB-like",
    "celeba": "CelebA",
    "faces_like": "Faces-like",
    "scm_sprites": "SCM sprites",
}
_LETTERS = {
    "beta": "β",
    "gamma": "γ",
    "lambda": "λ",
    "lambda_od": "λ_od",
    "lambda_d": "λ_d",
    "capacity": "C",
    "codes": "K",
    "code_width": "D",
}
# The options that name an architecture; the others are in the methods, and in a label where runs differ in them.
_NAMING = {
    "beta_vae": ("beta",),
    "annealed_vae": ("gamma", "capacity"),
    "factor_vae": ("gamma",),
    "beta_tcvae": ("beta",),
    "dip_vae_i": ("lambda_od", "lambda_d"),
    "dip_vae_ii": ("lambda_od", "lambda_d"),
    "vq_vae": ("codes",),
}


def metric_name(name: str) -> str:
    return METRICS.get(name, name.replace("_", " "))


def data_name(name: str) -> str:
    return _DATA.get(name, name)


def architecture_name(name: str) -> str:
    return _MODELS.get(name, name.replace("_", " "))


def prose(text: str) -> str:
    """`text` with data sets and architectures, which it may name as configurations do, by the names readers know."""
    names = _MODELS | _DATA
    found = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    return re.sub(rf"(?<![\w.])(?:{found})(?![\w=]|\.\w)", lambda match: names[match.group()], text)


def option_name(name: str) -> str:
    return _LETTERS.get(name, name.replace("_", " "))


def naming_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are part of the architecture's name; all of an architecture that is not known here."""
    options = config.get("options", {})
    wanted = _NAMING.get(config["architecture"], tuple(options))
    return {key: options[key] for key in wanted if key in options}


def model_name(config: Mapping[str, Any]) -> str:
    """The architecture and the options that name it: "β-VAE (β = 4)"."""
    options = ", ".join(f"{option_name(k)} = {plain(v)}" for k, v in naming_options(config).items())
    return architecture_name(config["architecture"]) + (f" ({options})" if options else "")


def decimals(values: Iterable[float | None], digits: int = 3) -> int:
    """Decimals that give the largest of `values` `digits` significant digits; one number of them for a whole column."""
    largest = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0)
    if largest == 0:
        return digits - 1
    return min(9, max(0, digits - 1 - math.floor(math.log10(largest))))


def number(value: float | None, places: int) -> str:
    """`value` with `places` decimals and a real minus sign; a dash for nothing, NaN or infinity.

    What is not 0 but would be printed so is "<0.001", the least that shows.
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    if value and round(value, places) == 0:
        return f"{'<' if value > 0 else '>−'}{10.0**-places:.{places}f}"
    return f"{abs(value) if value == 0 else value:,.{places}f}".replace("-", "−")


def interval(low: float | None, high: float | None, places: int) -> str:
    """ "[low, high]", or nothing where either end is missing or infinite."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    if low and high and round(low, places) == round(high, places) == 0:
        return f"within ±{10.0**-places:.{places}f}"
    return f"[{_end(low, places)}, {_end(high, places)}]"


def _end(value: float, places: int) -> str:
    """An end of an interval: as `number`, but rounded to 0 where it is that near."""
    return number(round(value, places), places)


def probability(p: float) -> str:
    """ "= 0.031", or "< 0.001"."""
    return "< 0.001" if p < 0.001 else f"= {p:.2g}" if p >= 0.01 else f"= {p:.1g}"


def plain(value: Any) -> str:
    """A setting as one writes it: 4.0 is 4, 10000 is 10,000, true is yes, nothing is a dash."""
    if value is None or value == "" or value == () or value == []:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}".replace("-", "−")
    if isinstance(value, Mapping):
        return ", ".join(f"{option_name(k)} = {plain(v)}" for k, v in value.items()) or NOTHING
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value)
    return str(value)


def duration(seconds: float) -> str:
    """ "0.8 s", "34 s", "4 min 05 s", "2 h 10 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def counted(count: int, noun: str, plural: str = "") -> str:
    """ "one run", "12 runs"; small numbers as words."""
    small = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    word = small[count] if count < len(small) else f"{count:,}"
    return f"{word} {noun if count == 1 else plural or noun + 's'}"


def listed(names: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


_GREEK = {"mu": "μ", "sigma": "σ", "delta": "δ"}
_SUBSCRIPTED = re.compile(r"\b(mu|sigma|delta|Var|E|[a-z])_([a-z])(\^2)?(?![a-z])")


def typeset(definition: str) -> Markup:
    """A definition in ASCII letters, as in "Var_x[mu_i] / s_i^2", with its letters set as mathematics."""
    text = str(escape(definition))
    text = re.sub(r"\bz\b", "<i>z</i>", text)  # the lone letter: one with a subscript is no word boundary
    text = re.sub(r"\bv\b", "<i>v</i>", text)
    text = _SUBSCRIPTED.sub(lambda m: f"{_letter(m[1])}<sub>{m[2]}</sub>{'<sup>2</sup>' if m[3] else ''}", text)
    text = re.sub(r"\bdelta\b", "<i>δ</i>", text)
    text = re.sub(r"\|dy\|", "|Δ<i>y</i>|", text)
    text = re.sub(r"\|t\|", "|<i>t</i>|", text)
    text = re.sub(r"(?<=[ ,])t(?= [=s<])", "<i>t</i>", text)
    text = re.sub(r"\b([HI])\(", r"<i>\1</i>(", text)
    text = re.sub(r"\blog G\b", "log <i>G</i>", text)
    text = re.sub(r"\bC_ii\b", "<i>C</i><sub>ii</sub>", text)
    text = re.sub(r"(?<=\))\^2", "<sup>2</sup>", text)
    return Markup(text.replace(" - ", " − ").replace("+-", "±").replace("...", "…"))


def _letter(name: str) -> str:
    return name if name in ("Var", "E") else f"<i>{_GREEK.get(name, name)}</i>"
