"""A UNet of diffusers, where it is installed: every unit of its sites against a loop of hooks."""

import pytest
import torch
from hook_loop import assert_equals_hook_loop

import vaecirc_fast as vf
from vaecirc_fast.errors import InputError

diffusers = pytest.importorskip("diffusers")
N = 3


def unet():
    """Random weights; blocks down and up, with and without attention, and the skips between them."""
    torch.manual_seed(0)
    module = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return module.eval(), torch.randn(N, 1, 8, 8, generator=generator), torch.randn(N, 1, 8, 8, generator=generator)


CASES = [
    ("channel", None, ["conv_in", "time_embedding.linear_1", "down_blocks.0.resnets.0", "mid_block.resnets.0.conv1"]),
    ("channel", None, ["up_blocks.0.attentions.0", "up_blocks.0.upsamplers.0", "up_blocks.1.resnets.1.conv2"]),
    ("cell", None, ["down_blocks.1.resnets.0", "up_blocks.0.resnets.1"]),
    ("token", None, ["mid_block.attentions.0.to_v"]),
    (
        "head",
        2,
        ["down_blocks.1.attentions.0.to_q", "up_blocks.0.attentions.1.to_k", "mid_block.attentions.0.to_out.0"],
    ),
]


@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize(("unit", "heads", "sites"), CASES)
def test_every_unit_equals_a_loop_of_hooks(unit, heads, sites, tile):
    module, x_base, x_source = unet()
    steps = torch.tensor([10, 400, 900])
    given = {"unit": unit, "heads": heads, "tile": tile}
    readout = lambda out: out.sample  # noqa: E731
    P = assert_equals_hook_loop(module, (x_base, steps), (x_source, steps.flip(0)), sites, **given, readout=readout)
    assert "only what depends on" in P.plan


def test_its_output_is_the_one_tensor_in_it():
    """And the step may be a number, or a tensor without axes, for all samples."""
    module, x_base, x_source = unet()
    m, site = vf.wrap(module), ["mid_block.resnets.1.conv2"]
    plain = m.patch_sweep((x_base, 10), (x_source, 10), site, readout=lambda out: out.sample)
    for step in (10, torch.tensor(10), torch.full((N,), 10)):
        P = m.patch_sweep((x_base, step), (x_source, step), site)
        torch.testing.assert_close(P.tensor, plain.tensor)


def test_a_shared_module_is_refused_by_name():
    """The activation of a block runs for each of its halves."""
    module, x_base, x_source = unet()
    with pytest.raises(InputError, match="down_blocks.0.resnets.0.nonlinearity: runs 3 times in one pass"):
        vf.wrap(module).patch_sweep((x_base, 10), (x_source, 10), ["down_blocks.0.resnets.0.nonlinearity"])


def test_caches_patches_and_mediation():
    module, x_base, x_source = unet()
    m = vf.wrap(module)
    _, cache = m.run_with_cache((x_source, 10), ["up_blocks.1.resnets.0"])
    y = m.patch((x_base, 10), {"up_blocks.1.resnets.0[3]": cache}).sample
    assert y.shape == x_base.shape and not torch.equal(y, m.run_with_cache((x_base, 10), [])[0].sample)
    M = m.mediate((x_base, 10), (x_source, 10), mediators="conv_in[*]")
    torch.testing.assert_close(M.te, M.nde_pure + M.nie_total)
