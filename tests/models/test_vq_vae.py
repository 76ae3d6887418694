"""The VQ-VAE: its loss and its codebook's moves against numpy, gradients, invariances, resuming, bad input."""

import math
import warnings

import numpy as np
import pytest
import torch

import vaecirc_fast as vf
from vaecirc_fast import metrics, models, planted, training
from vaecirc_fast.data.dataset import Dataset
from vaecirc_fast.errors import InputError
from vaecirc_fast.interventions import code_sweep

SHAPE = (1, 8, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def build(net="mlp", latents=3, **options):
    torch.manual_seed(1)
    given = {"codes": 12, "code_width": 4, "width": 0.1, **options}
    return models.build("vq_vae", SHAPE, latents, net=net, **given)


def images(count=6, dtype=torch.float32):
    return torch.bernoulli(torch.full((count, *SHAPE), 0.4, dtype=dtype), generator=seeded())


def by_numpy(z_e, codebook):
    """Codes of z_e (B, D, L) and their squared distances, by a loop over slots."""
    indices, squares = np.zeros(z_e.shape[::2], int), np.zeros(z_e.shape[::2])
    for b, p in np.ndindex(*indices.shape):
        distances = ((codebook - z_e[b, :, p]) ** 2).sum(1)
        indices[b, p], squares[b, p] = distances.argmin(), distances.min()
    return indices, squares


# --- the model's face ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_shapes_and_sites(net):
    model = build(net)
    seen = {}
    for name in ("encoder.head", "quantiser", "decoder.fc1"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: output}))
    x = images()
    codes = model.encode(x)
    assert codes.indices.shape == (6, 3) and codes.z_e.shape == codes.z_q.shape == (6, 4, 3)
    assert torch.equal(codes.z_q, model.codebook[codes.indices].transpose(1, 2))
    assert torch.equal(seen["quantiser"], codes.z_q)
    # the head's units are slot after slot
    assert torch.equal(seen["encoder.head"].view(6, 3, 4).transpose(1, 2), codes.z_e)
    y = model.decode(codes.z_q)
    assert y.shape == x.shape and torch.equal(model(x), y) and torch.equal(model.decoder(codes.z_q), y)
    assert model.codebook.shape == (12, 4) and not list(model.quantiser.parameters())
    assert model.config()["codes"] == 12 and model.config()["code_width"] == 4
    names = {name for name, _ in model.named_modules()} - {"", "encoder", "decoder", "quantiser", "encoder.head"}
    vae = {name for name, _ in models.build("vae", SHAPE, 3, net=net).named_modules()}
    assert names == vae - {"", "encoder", "decoder", "encoder.mu", "encoder.logvar"}


def test_sweeps_take_the_models_codes():
    model = build().eval()
    codes = model.encode(images())
    for grid, shape in (
        ("code_swap", (3, 4, 1)),
        ("code_neighbour", (3, 4, 1)),
        ("z_e", (4, 8, 1)),
        ("z_q", (4, 8, 1)),
    ):
        effects = code_sweep(model.decoder, codes, model.codebook, grid=grid)
        assert tuple(effects.mean().shape) == shape


@pytest.mark.parametrize("circuit", planted.codebook.all(), ids=lambda c: c.name)
def test_a_planted_codebook_through_the_quantiser(circuit):
    """Codes found by the model's quantiser are the planted ones, and their sweeps the closed form."""
    quantiser = models.vq_vae.Quantiser(len(circuit.codebook), circuit.codebook.shape[1]).double()
    quantiser.codebook.copy_(circuit.codebook)
    z_e = circuit.z_e.flatten(2)
    indices = quantiser.assign(z_e).indices
    assert torch.equal(indices, circuit.indices.flatten(1))
    z_q = quantiser(z_e)
    assert torch.equal(z_q, circuit.z_q.flatten(2))
    found = models.Codes(indices.view_as(circuit.indices), circuit.z_e, z_q.view_as(circuit.z_q))
    for grid in ("code_neighbour", "z_e", "z_q"):
        effects = code_sweep(circuit.decoder, found, quantiser.codebook, grid=grid, groups=circuit.groups)
        truth = circuit.effects(grid)  # exact but for the order of additions
        assert np.abs(effects.mean().numpy() - truth).max() < 64 * np.finfo(float).eps * (1 + np.abs(truth).max())


# --- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_loss_by_numpy(net, likelihood):
    model = build(net, likelihood=likelihood, commitment=0.7).double().eval()
    x = images(dtype=torch.float64)
    with torch.no_grad():
        z_e = model.encoder(x)
        indices, squares = by_numpy(z_e.numpy(), model.codebook.numpy())
        z_q = np.moveaxis(model.codebook.numpy()[indices], 2, 1)
        y = model.decoder(torch.from_numpy(z_q).contiguous()).numpy()
    if likelihood == "bernoulli":
        nll = -(x.numpy() * np.log(y) + (1 - x.numpy()) * np.log(1 - y))
    else:
        nll = (x.numpy() - y) ** 2 / 2 + math.log(2 * math.pi) / 2
    terms = model.loss(x)
    assert list(terms) == ["loss", "reconstruction", "commitment"]
    expected = [nll.sum() / 6 + 0.7 * squares.sum() / 6, nll.sum() / 6, 0.7 * squares.sum() / 6]
    torch.testing.assert_close([float(t.detach()) for t in terms.values()], expected, rtol=1e-10, atol=0)
    np.testing.assert_array_equal(model.encode(x).indices, indices)


def test_gradients_are_straight_through():
    """Of the encoder: the decoder's gradient at z_q, as if of z_e, plus that of the commitment, by finite formula."""
    model = build().double().eval()
    x = images(dtype=torch.float64)
    model.loss(x)["loss"].backward()
    z_e = model.encoder(x).detach()
    indices, _ = by_numpy(z_e.numpy(), model.codebook.numpy())
    z_q = model.codebook[torch.from_numpy(indices)].transpose(1, 2).clone().requires_grad_()
    (at_z_q,) = torch.autograd.grad(model.reconstruction(x, model.decoder.logits(z_q)), z_q)
    upstream = at_z_q + 2 * 0.25 * (z_e - z_q.detach()) / 6
    expected = torch.autograd.grad(model.encoder(x), list(model.encoder.parameters()), upstream)
    for parameter, grad in zip(model.encoder.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    # z_q of `encode` passes gradients in the same way
    codes = model.encode(x)
    (grad,) = torch.autograd.grad(codes.z_q, codes.z_e, upstream)
    assert torch.equal(grad, upstream)


def test_the_codebook_moves_by_moving_averages():
    """Three updates against the appendix' formulas, by loops in numpy, without and with codes drawn anew."""
    for reseed in (False, True):
        model = build(codes=5, decay=0.8, reseed=reseed).double().train()
        quantiser, x = model.quantiser, images(dtype=torch.float64)
        book, counts = model.codebook.numpy().copy(), np.zeros(5) if reseed else np.ones(5)
        sums = book * counts[:, None]
        z_e = model.encoder(x).detach().numpy()
        for step in range(3):
            model.loss(x, seeded(step))
            indices, _ = by_numpy(z_e, book)
            rows = np.moveaxis(z_e, 1, 2).reshape(-1, 4)
            for k in range(5):
                chosen = rows[indices.ravel() == k]
                counts[k] = 0.8 * counts[k] + 0.2 * len(chosen)
                sums[k] = 0.8 * sums[k] + 0.2 * chosen.sum(0)
            if reseed:
                drawn = rows[torch.randperm(18, generator=seeded(step)).numpy()]
                dead = counts < 0.1 * counts.sum() / 5
                assert dead.any() == (step == 0)
                counts[dead], sums[dead] = 1, drawn[:5][dead]
            smoothed = (counts + 1e-5) / (counts.sum() + 5e-5) * counts.sum()
            book = sums / smoothed[:, None]
            for name, expected in (("counts", counts), ("sums", sums), ("codebook", book)):
                np.testing.assert_allclose(getattr(quantiser, name).numpy(), expected, rtol=1e-10, atol=1e-13)


def test_only_training_moves_the_codebook():
    model = build().eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = images()
    model.loss(x), model.encode(x), model.usage(x), model.train().encode(x), model(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.loss(x)
    assert not torch.equal(model.codebook, before["quantiser.codebook"])


def test_all_randomness_comes_from_the_generator():
    found = []
    for seed in (0, 0, 1):
        model = build(codes=40).train()
        state = torch.get_rng_state()
        model.loss(images(), seeded(seed))
        assert torch.equal(torch.get_rng_state(), state)
        found.append(model.codebook.clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_dead_codes_come_from_the_batch():
    """After one update every code that the batch did not use is one of its z_e, as long as those last, each once."""
    model = build(codes=18).train()
    x = images()
    z_e = model.encoder(x).detach().transpose(1, 2).flatten(0, 1)
    unused = model.usage(x).counts == 0
    model.loss(x, seeded())
    fresh = model.codebook[unused]
    nearest = (fresh[:, None] - z_e).abs().amax(2).min(1)
    assert unused.any() and float(nearest.values.max()) < 1e-4
    assert len(set(nearest.indices.tolist())) == len(fresh)


def test_usage():
    model = build(codes=4, code_width=1, latents=1)
    with torch.no_grad():
        model.codebook.copy_(torch.tensor([[-1e6], [0.0], [1e6], [2e6]]))
        model.encoder.head.weight.zero_()
        model.encoder.head.bias.zero_()
    usage = model.usage(images())
    assert usage.perplexity == pytest.approx(1) and usage.share == 0.25 and usage.counts.tolist() == [0, 6, 0, 0]
    x = images(8)
    model.encode = lambda x: models.Codes(torch.tensor([[0], [0], [1], [3]]), None, None)
    usage = model.usage(x)
    assert usage.perplexity == pytest.approx(2**1.5) and usage.share == 0.75
    with pytest.raises(InputError, match="at least one image"):
        build().usage(images(0))


# --- invariances -----------------------------------------------------------------------------------------------------


def test_permuting_the_codebook_permutes_the_indices_and_nothing_else():
    model = build().double()
    x, order = images(dtype=torch.float64), torch.randperm(12, generator=seeded())
    before, loss = model.encode(x), model.eval().loss(x)
    model.quantiser.codebook.copy_(model.codebook[order].clone())
    after = model.encode(x)
    assert torch.equal(order[after.indices], before.indices)
    assert torch.equal(after.z_q, before.z_q) and torch.equal(after.z_e, before.z_e)
    assert all(torch.equal(a, b) for a, b in zip(loss.values(), model.loss(x).values(), strict=True))


def test_a_rotation_of_the_code_space_changes_no_index():
    """Head, codebook and fc1 rotated: the same indices, distances and images, and the codebook moves as rotated."""
    plain, turned = build(reseed=False).double(), build(reseed=False).double()
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=seeded()))
    with torch.no_grad():
        head, fc1 = turned.encoder.head, turned.decoder.fc1
        head.weight.copy_((rotation @ head.weight.view(3, 4, -1)).reshape(12, -1))
        head.bias.copy_((head.bias.view(3, 4) @ rotation.T).flatten())
        for name in ("codebook", "sums"):
            getattr(turned.quantiser, name).copy_(getattr(plain.quantiser, name) @ rotation.T)
        fc1.weight.copy_((rotation @ fc1.weight.view(-1, 4, 3)).reshape(-1, 12))
    x = images(dtype=torch.float64)
    before, after = plain.encode(x), turned.encode(x)
    assert torch.equal(before.indices, after.indices)
    torch.testing.assert_close(plain.train().loss(x), turned.train().loss(x))
    torch.testing.assert_close(turned.codebook, plain.codebook @ rotation.T)


# --- training, files -------------------------------------------------------------------------------------------------


class Stripes(Dataset):
    """Images of one bright row and one bright column: 64 of them."""

    name, shape, factor_names, factor_sizes = "stripes", SHAPE, ("row", "column"), (8, 8)

    def _render(self, indices):
        x, n = torch.zeros(len(indices), *SHAPE), torch.arange(len(indices))
        x[n, 0, indices // 8] = 1
        x[n, 0, :, indices % 8] = 1
        return x


def fitted(steps, out=None, **options):
    model = build(**options)
    training.fit(model, Stripes(), steps=steps, batch_size=16, out=out, progress=False, checkpoint_every=4)
    return model


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_resumed_to_the_bit(net, tmp_path):
    straight = fitted(10, tmp_path / "a", net=net)
    fitted(6, tmp_path / "b", net=net)
    resumed = fitted(10, tmp_path / "b", net=net)
    state = straight.state_dict()
    assert {"quantiser.codebook", "quantiser.counts", "quantiser.sums"} <= set(state)
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())
    loaded = models.load(tmp_path / "a" / "model.safetensors")
    assert loaded.config() == straight.config()
    x = images()
    assert all(torch.equal(a, b) for a, b in zip(loaded.encode(x), straight.eval().encode(x), strict=True))


@pytest.mark.deep
@pytest.mark.parametrize("reseed", [True, False])
def test_it_learns(reseed):
    """The presets' rule for a trained model, and codes in use: more of them where dead ones are drawn anew."""
    ds = vf.data.load("dsprites")
    torch.manual_seed(0)
    model = models.build("vq_vae", ds.shape, reseed=reseed)
    training.fit(model, ds, steps=800, progress=False)
    x, _ = ds.sample(500, seeded(9))
    y = model.eval().decode(model.encode(x).z_q)
    losses = metrics.reconstruction_loss(x, y), metrics.mean_image_loss(x)
    assert metrics.reconstruction_report(*losses).trained
    assert model.usage(x).perplexity > (200 if reseed else 20)


@pytest.mark.parametrize("net", ["conv", "mlp"])
def test_bfloat16_leaves_codes_and_sums_in_float32(net):
    model = build(net).train()
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        codes = model.encode(images())
        terms = model.loss(images(), seeded())
    assert codes.z_e.dtype == codes.z_q.dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())
    indices, _ = by_numpy(codes.z_e.detach().numpy(), build(net).codebook.numpy())
    np.testing.assert_array_equal(codes.indices, indices)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codes": 1}, "codes: expected an integer of at least 2, got 1"),
        ({"codes": 2.0}, "codes: expected an integer of at least 2, got 2.0"),
        ({"code_width": 0}, "code_width: expected an integer of at least 1"),
        ({"decay": 1.0}, "decay: expected a number between 0 and 1, got 1.0"),
        ({"decay": 0}, "decay: expected a number between 0 and 1, got 0"),
        ({"decay": math.nan}, "decay: expected a number between 0 and 1, got nan"),
        ({"decay": "slow"}, "decay: expected a number between 0 and 1, got 'slow'"),
        ({"commitment": 0}, "commitment: expected a positive number, got 0"),
        ({"reseed": 1}, "reseed: expected True or False, got 1"),
        ({"beta": 2.0}, "unknown option beta of model 'vq_vae'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        build(**options)


def test_wrong_inputs():
    model = build()
    for z in (torch.randn(2, 3, 4), torch.randn(2, 12), torch.zeros(2, 4, 3, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"z: expected floats of shape \(B, 4, 3\)"):
            model.decode(z)
    for method in (model.encode, model.forward, model.loss, model.usage):
        with pytest.raises(InputError, match="x: expected shape"):
            method(torch.rand(2, 3, 8, 8))
    bad = images()
    bad[2, 0, 3, 3] = math.nan
    codebook = model.codebook.clone()
    with pytest.raises(InputError, match="x: the bernoulli likelihood needs values"):
        model.train().loss(bad)
    assert torch.equal(model.codebook, codebook)


def test_divergence_is_named():
    model = build(likelihood="gaussian")
    with torch.no_grad():
        model.encoder.head.bias[0] = math.nan
    with pytest.raises(vf.errors.TrainingDiverged, match="the loss is nan at step 1"):
        training.fit(model, Stripes(), steps=2, batch_size=4, progress=False)
