"""A small real study for the tests of the report, once a session, and a parser that reads its page."""

import json
import shutil
from html.parser import HTMLParser

import pytest
import torch

from vaecirc_fast import report
from vaecirc_fast.studies import image
from vaecirc_fast.sweeps import RunStore

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Checks the nesting of a page and keeps its text, ids, links, figures and the rows of its tables by table id."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.source, self.open, self.problems = source, [], []
        self.ids, self.attributes, self.words = [], [], []
        self.tables, self._table, self._cell = {}, None, None
        self.feed(source)
        self.close()
        self.problems += [f"<{tag}> is never closed" for tag in self.open]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        found = dict(attrs)
        if tag == "table":
            self._table = self.tables.setdefault(found.get("id", f"table {len(self.tables)}"), [])
        if self._table is not None and tag == "tr":
            self._table.append([])
        if self._table and tag in ("td", "th"):
            self._table[-1].append("")
            self._cell = self._table[-1]
        if tag in ("span", "small") and self._cell is not None:
            self._cell[-1] += " "

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for key, value in attrs if key == "id"]
        self.attributes += [(tag, key, value) for key, value in attrs]

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.problems.append(f"</{tag}> closes {self.open[-1:] or 'nothing'} in line {self.getpos()[0]}")
        else:
            self.open.pop()
        if tag == "table":
            self._table = None
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if self._cell is not None:
            self._cell[-1] += data


@pytest.fixture
def page():
    """Reads report.html of a directory, after writing it."""

    def read(directory):
        return Page(report.write(directory).read_text(encoding="utf-8"))

    return read


@pytest.fixture(scope="session")
def untrained_study(tmp_path_factory):
    """The smoke study with too few steps to learn anything: two architectures, two seeds, none of them trained."""
    return small_study(tmp_path_factory.mktemp("report") / "study", seeds=2, circuit_pairs=0)


@pytest.fixture(scope="session")
def untrained_circuits(tmp_path_factory):
    """One such run with circuits."""
    sizes = {"circuit_pairs": 8, "circuit_units": 3}
    return small_study(tmp_path_factory.mktemp("circuits") / "study", seeds=1, architectures=["vae"], **sizes)


def small_study(out, **more):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    changes = {
        "steps": 20,
        "images": 100,
        "sweep_images": 8,
        "pairs": 8,
        "net": "mlp",
        "data": ["digits"],
        "latents": 10,
    }
    changes |= {"architectures": ["vae", "beta_vae"], "options": ["beta_vae.beta=4"], **more}
    settings = {"data": ["digits"], "architectures": ["vae", "beta_vae"], "coverage": "all", "workers": 1} | changes
    image.run(image.Config.preset("smoke", out=out, **settings), progress=False)
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="session")
def change():
    """Applies a function to the results of the runs of a directory that match a pattern."""

    def apply(directory, pattern, edit):
        files = sorted(directory.glob(f"runs/{pattern}/result.json"))
        assert files
        for file in files:
            result = json.loads(file.read_text())
            edit(result)
            file.write_text(json.dumps(result))

    return apply


@pytest.fixture
def study(untrained_study, change, tmp_path):
    """A copy in which three of the four runs count as trained, all but beta_vae's seed 1."""
    out = tmp_path / "study"
    shutil.copytree(untrained_study, out, ignore=shutil.ignore_patterns("checkpoint*", "model*", "findings.json"))
    change(out, "digits-vae-*", lambda result: result.update(trained=True))
    change(out, "digits-beta_vae-s0-*", lambda result: result.update(trained=True))
    return out


@pytest.fixture
def circuits(untrained_circuits, change, tmp_path):
    """A copy of the run with circuits that counts as trained."""
    out = tmp_path / "circuits"
    shutil.copytree(untrained_circuits, out, ignore=shutil.ignore_patterns("checkpoint*", "model*", "findings.json"))
    change(out, "digits-vae-s0-*", lambda result: result.update(trained=True))
    return out


@pytest.fixture(scope="session")
def add_run():
    """Adds to a study the run `source`, a path, again: with other configuration and `edit` applied to its result."""

    def add(directory, source, name, edit=lambda result: None, **config):
        result = json.loads((source / "result.json").read_text())
        run = RunStore(directory).run(name, {**result.pop("config"), **config})
        run.begin()
        result.pop("id")
        edit(result)
        for file in source.glob("*.safetensors"):
            if not file.name.startswith(("checkpoint", "model")):
                shutil.copy(file, run.path)
        run.finish(result)
        return run.path

    return add


ARCHITECTURES = {
    "vae": {},
    "beta_vae": {"beta": 4.0},
    "factor_vae": {"gamma": 10.0, "hidden": 1000},
    "dip_vae_ii": {"lambda_od": 10.0, "lambda_d": 10.0},
}


@pytest.fixture(scope="session")
def many_study(untrained_study, add_run, tmp_path_factory):
    """Two data sets by four architectures by one seed, all counted as trained but for the FactorVAE on Faces-like, and
    numbers that differ: of run n every metric is 1 + n / 10 times that of its source."""
    out = tmp_path_factory.mktemp("many") / "study"
    source = sorted(untrained_study.glob("runs/digits-vae-s0-*"))[0]
    names = []
    for n, (data, kind) in enumerate((d, k) for d in ("norb_like", "faces_like") for k in ARCHITECTURES):

        def edit(result, n=n, failed=(data, kind) == ("faces_like", "factor_vae")):
            result["trained"] = not failed
            entries = [*result["metrics"].values(), *result["disentanglement"]["trained"].values()]
            for entry in entries:
                for key in ("value", "low", "high"):
                    if isinstance(entry[key], float):
                        entry[key] *= 1 + n / 10
            result["disentanglement"]["trained"]["dci_disentanglement"] |= {"value": 0.1 + n / 20, "notes": []}

        options = ARCHITECTURES[kind]
        path = add_run(out, source, f"{data}-{kind}-s0", edit, data=data, architecture=kind, options=options)
        names.append(path.name)
    (out / "study.json").write_text(json.dumps({"runs": names}))
    return out


@pytest.fixture
def many(many_study, tmp_path):
    """A copy of it."""
    shutil.copytree(many_study, tmp_path / "study")
    return tmp_path / "study"
