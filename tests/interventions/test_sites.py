"""Sites of a module: their order, shapes, units and downstream operations, and a module that is left as it was."""

import pytest
import torch
from torch import nn

import vaecirc_fast as vf
from vaecirc_fast import models
from vaecirc_fast.errors import InputError


def conv_model():
    torch.manual_seed(0)
    return models.build("vae", (1, 64, 64), 10)


ENCODER = ["encoder.conv1", "encoder.conv2", "encoder.conv3", "encoder.conv4", "encoder.fc"]
DECODER = ["decoder.fc1", "decoder.fc2", "decoder.ct1", "decoder.ct2", "decoder.ct3", "decoder.ct4"]


def test_sites_in_the_order_in_which_they_run():
    """A container runs when its last part has."""
    table = vf.wrap(conv_model()).sites()
    assert list(table.columns) == ["site", "type", "shape", "units", "downstream_flops"]
    heads = ["encoder.mu", "encoder.logvar"]
    assert table["site"].to_list() == [*ENCODER, *heads, "encoder", *DECODER, "decoder"]
    backwards = nn.ModuleDict({"last": nn.Linear(3, 3), "first": nn.Linear(3, 3)})
    backwards.forward = lambda x: backwards["last"](backwards["first"](x))
    assert vf.wrap(backwards, torch.ones(1, 3)).sites()["site"].to_list() == ["first", "last"]


def test_shapes_and_units():
    table = vf.wrap(conv_model()).sites().set_index("site")
    shapes = {
        "encoder.conv1": (32, 32, 32),
        "encoder.conv2": (32, 16, 16),
        "encoder.conv3": (64, 8, 8),
        "encoder.conv4": (64, 4, 4),
        "encoder.fc": (256,),
        "encoder.mu": (10,),
        "encoder.logvar": (10,),
        "decoder.fc1": (256,),
        "decoder.fc2": (1024,),
        "decoder.ct1": (64, 8, 8),
        "decoder.ct2": (32, 16, 16),
        "decoder.ct3": (32, 32, 32),
        "decoder.ct4": (1, 64, 64),
        "decoder": (1, 64, 64),
    }
    assert table["shape"].drop("encoder").to_dict() == shapes
    assert table["units"].drop("encoder").to_dict() == {site: shape[0] for site, shape in shapes.items()}
    assert table.loc["encoder", "shape"] is None and table["units"].isna()["encoder"]  # a pair of tensors
    assert table.loc["decoder.ct1", "type"] == "ConvTranspose2d" and table.loc["encoder.fc", "type"] == "Linear"


def test_downstream_operations_by_hand():
    """Two per multiply-add: a transposed convolution puts every input pixel through Cin x Cout x k x k weights."""
    table = vf.wrap(conv_model()).sites("decoder*").set_index("site")["downstream_flops"]
    own = {
        "decoder.fc1": 2 * 10 * 256,
        "decoder.fc2": 2 * 256 * 1024,
        "decoder.ct1": 2 * 4 * 4 * 64 * 64 * (4 * 4),
        "decoder.ct2": 2 * 4 * 4 * 64 * 32 * (8 * 8),
        "decoder.ct3": 2 * 4 * 4 * 32 * 32 * (16 * 16),
        "decoder.ct4": 2 * 4 * 4 * 32 * 1 * (32 * 32),
    }
    for position, site in enumerate(DECODER):
        assert table[site] == sum(own[later] for later in DECODER[position + 1 :]), site
    assert table["decoder"] == 0 and table["decoder.ct4"] == 0


def test_downstream_operations_of_the_encoder_by_hand():
    table = vf.wrap(conv_model()).sites().set_index("site")["downstream_flops"]
    convolutions = [  # output pixels x Cin x Cout x k x k
        2 * 4 * 4 * 32 * 32 * (16 * 16),
        2 * 2 * 2 * 32 * 64 * (8 * 8),
        2 * 2 * 2 * 64 * 64 * (4 * 4),
        2 * 1024 * 256,
        2 * 2 * 256 * 10,
    ]
    decoder = table["decoder.fc1"] + 2 * 10 * 256
    for position, site in enumerate(ENCODER):
        assert table[site] == sum(convolutions[position:]) + decoder, site
    assert table["encoder"] == decoder


def test_operations_are_for_one_row_of_the_example():
    wrapped = vf.wrap(conv_model())
    one, five = (wrapped.sites(example=torch.zeros(rows, 1, 64, 64)) for rows in (1, 5))
    assert one.equals(five)


def test_patterns_choose_and_a_miss_names_what_there_is():
    wrapped = vf.wrap(conv_model())
    assert wrapped.sites("decoder.*")["site"].to_list() == DECODER
    assert wrapped.sites("*conv[12]")["site"].to_list() == ENCODER[:2]
    assert wrapped.sites("decoder")["site"].to_list() == ["decoder"]
    with pytest.raises(InputError, match=r"sites: nothing matches 'decoder.conv\*'; the module has encoder, .*decoder"):
        wrapped.sites("decoder.conv*")
    with pytest.raises(InputError, match="nothing matches 'Decoder'"):  # the case matters
        wrapped.sites("Decoder")
    with pytest.raises(InputError, match="nothing matches .*; the module has no submodules"):
        vf.wrap(nn.Linear(2, 2)).sites()


def test_without_an_example_shapes_are_missing():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    table = vf.wrap(module).sites()
    assert table["site"].to_list() == ["0", "1"] and table["type"].to_list() == ["Linear", "ReLU"]
    assert table["shape"].isna().all() and table["units"].isna().all() and table["downstream_flops"].isna().all()
    table = vf.wrap(module, torch.zeros(2, 3)).sites()
    assert table["shape"].to_list() == [(4,), (4,)] and table["downstream_flops"].to_list() == [0, 0]


def test_sites_that_the_example_does_not_reach_come_last():
    module = nn.ModuleDict({"unused": nn.Linear(2, 2), "used": nn.Linear(2, 3)})
    module.forward = lambda x: module["used"](x)
    table = vf.wrap(module, torch.zeros(1, 2)).sites()
    assert table["site"].to_list() == ["used", "unused"] and table["shape"].to_list() == [(3,), None]
    assert table["units"].isna().to_list() == [False, True]


def test_several_inputs_are_a_tuple():
    table = vf.wrap(nn.Bilinear(2, 3, 4), (torch.zeros(5, 2), torch.zeros(5, 3)))
    with pytest.raises(InputError, match="no submodules"):
        table.sites()
    module = nn.ModuleDict({"pair": nn.Bilinear(2, 3, 4)})
    module.forward = lambda x, y: module["pair"](x, y)
    table = vf.wrap(module, (torch.zeros(5, 2), torch.zeros(5, 3))).sites()
    assert table["shape"].to_list() == [(4,)]


def state(module):
    return (
        [(name, m.training, len(m._forward_hooks)) for name, m in module.named_modules()],
        {name: t.clone() for name, t in module.state_dict().items()},
    )


def same(a, b):
    return a[0] == b[0] and all(torch.equal(t, b[1][name]) for name, t in a[1].items())


def test_the_module_is_left_as_it_was():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    module[2].eval()
    module[0].register_forward_hook(lambda *args: None)
    before = state(module)
    vf.wrap(module, torch.randn(5, 3)).sites()
    assert same(before, state(module)) and module.training and not module[2].training
    assert module[0].weight.grad is None


def test_the_module_is_left_as_it_was_when_the_example_does_not_fit():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(5, 1)).train()
    before = state(module)
    with pytest.raises(RuntimeError):
        vf.wrap(module).sites(example=torch.randn(5, 3))
    assert same(before, state(module))


def test_only_modules_are_wrapped():
    with pytest.raises(InputError, match=r"module: expected a torch\.nn\.Module, got function"):
        vf.wrap(lambda z: z)
