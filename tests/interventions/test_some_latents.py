"""Sweeps over some latents only: the rows of the whole sweep, and nothing else decoded."""

import pytest
import torch
from torch import nn

from vaecirc_fast import groups as partitions
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import Effects, latent_sweep

L = 5
GROUPS = partitions.spans([2, 4, 1])
SHIFTS = torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.0, 0.0], [1.0, -1.0], [0.5, 0.25]])
GRIDS = {
    "fixed": {},
    "posterior": {"grid": "posterior", "scale": torch.tensor([0.5, 1.0, 0.0, 2.0, 0.25])},
    "resample": {"grid": "resample", "seed": 3},
    "traverse": {"grid": "traverse"},
    "shifts": {"grid": SHIFTS},
}


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(L, 4), nn.Tanh(), nn.Linear(4, 7))


def codes(samples=16):
    return torch.randn(samples, L, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("engine", ["generic", "fused", "gram"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("chosen", [[3], [1, 4], [0, 2], [0, 1, 2, 3, 4]])
def test_the_rows_are_those_of_the_whole_sweep(engine, grid, chosen):
    groups = partitions.spans([6, 1]) if engine == "gram" else GROUPS
    options = {"groups": groups, "effect": "mse" if engine == "gram" else "l1", "engine": engine, **GRIDS[grid]}
    whole, some = (
        latent_sweep(network(), codes(), **options),
        latent_sweep(network(), codes(), latents=chosen, **options),
    )
    assert some.coords["latent"] == chosen and some.coords["step"] == whole.coords["step"]
    assert torch.allclose(some.tensor, whole.tensor[chosen], rtol=1e-5, atol=1e-7)
    assert torch.allclose(some.replicates, whole.replicates[:, chosen], rtol=1e-5, atol=1e-7)
    assert torch.allclose(some.step_replicates, whole.step_replicates[:, chosen], rtol=1e-5, atol=1e-7)
    assert some.step_size is None or torch.equal(some.step_size, whole.step_size[chosen])
    if grid == "shifts":
        zero = int((SHIFTS[chosen] == 0).sum())
        assert ("zero steps" in some.plan) == (zero > 0) and (not zero or f"{zero} zero steps not decoded" in some.plan)
    if grid != "traverse" and engine != "gram":
        table = some.ces()
        assert list(table["latent"]) == chosen
        assert table["ces"].to_numpy() == pytest.approx(whole.ces()["ces"][chosen].to_numpy(), rel=1e-5)


@pytest.mark.parametrize("given", [[4, 1], (4, 1), torch.tensor([4, 1]), range(1, 5, 3), {1, 4}])
def test_latents_come_in_ascending_order_and_keep_their_names(given, tmp_path):
    kept = latent_sweep(network(), codes(3), latents=given, reduce=None, groups=GROUPS)
    whole = latent_sweep(network(), codes(3), reduce=None, groups=GROUPS)
    assert kept.coords["latent"] == [1, 4] and torch.allclose(kept.tensor, whole.tensor[:, [1, 4]], atol=1e-6)
    assert set(kept.to_dataframe()["latent"]) == {1, 4} and list(kept.specificity()["latent"]) == [1, 4]
    kept.save(tmp_path / "e.safetensors")
    assert Effects.load(tmp_path / "e.safetensors").coords == kept.coords


def test_nothing_else_is_decoded():
    rows = []

    def decoder(z):
        rows.append(z.clone())
        return z

    z = codes(6)
    E = latent_sweep(decoder, z, latents=[3], engine="generic")
    others = [0, 1, 2, 4]
    assert sum(map(len, rows)) == 1 + 6 + 6 * 10 and f"{6 + 6 * 10} decodes" in E.plan
    assert bool((torch.cat(rows)[:, None, others] == z[:, others]).all(2).any(1).all()) and E.tensor.shape == (1, 10, 1)


def test_errors_number_latents_as_the_codes_do():
    with pytest.raises(InputError, match="NaN or infinite for latent 3 at step 9"):
        latent_sweep(lambda z: torch.where(z[:, 3:4] > 2.5, torch.nan, z), torch.zeros(3, L), latents=[1, 3])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([5], r"latents: expected some of 0\.\.4, got 5"),
        ([0, -1], r"latents: expected some of 0\.\.4, got -1"),
        ([], r"latents: expected some of 0\.\.4, got none"),
        ([1, 1], r"latents: expected each once, got \[1, 1\]"),
        ([0.5], r"latents: expected a sequence of integers, got \[0.5\]"),
        (2, "latents: expected a sequence of integers, got 2"),
        ("12", "latents: expected a sequence of integers, got '12'"),
        (torch.tensor([1.0]), "latents: expected a sequence of integers"),
    ],
)
def test_bad_latents(given, message):
    with pytest.raises(InputError, match=message):
        latent_sweep(network(), codes(), latents=given)
