"""TransformerLens' `patching` module by its own names and signatures: the same numbers, many patches a pass.

    from vaecirc_fast.compat.transformer_lens import generic_activation_patch, get_act_patch_resid_pre

What depends on no patch is computed once, not once a patch, and patches of one activation run together. The metric is
called once for each patch, on the logits of the whole batch, as there. TransformerLens itself is imported when a
function is called, for the names of activations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, MissingExtra
from ..interventions.patching import as_written
from ..interventions.versions import Versions

if TYPE_CHECKING:
    import pandas

Index = Sequence[int]
Metric = Callable[[Tensor], Tensor]
Setter = Callable[[Tensor, Index, Tensor], Tensor]


@torch.no_grad()
def generic_activation_patch(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Any,
    patching_metric: Metric,
    patch_setter: Setter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: pandas.DataFrame | None = None,
    return_index_df: bool = False,
) -> Tensor | tuple[Tensor, pandas.DataFrame]:
    """`transformer_lens.patching.generic_activation_patch`: a metric of the corrupted run for each patch of it.

    model: a HookedTransformer. corrupted_tokens: (batch, pos). clean_cache: activations by name. patching_metric:
    logits -> a tensor of one element; without gradients. patch_setter: (a copy of the corrupted activation, index, the
    clean activation) -> the patched one, which may be the copy. Indices are those of index_df, whose first
    column is the layer, or all of index_axis_names: "layer", "pos", "head_index", "head", "src_pos", "dest_pos".

    Returns the metrics, one for each index: of the axes' shape, (len(index_df),) for an index_df; with return_index_df
    also the indices. InputError names what cannot be the same: an activation that runs several times, or not at all, a
    model that draws random numbers or decides by values.
    """
    try:
        import transformer_lens.utilities as utilities  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        message = "generic_activation_patch patches TransformerLens' models: pip install transformer-lens"
        raise MissingExtra(message) from error
    if (index_axis_names is None) == (index_df is None):
        raise InputError("index_axis_names, index_df: give one of them")
    shape: list[int] = []
    if index_axis_names is not None:
        shape = _sizes(model, corrupted_tokens, activation_name, index_axis_names)
        index_df = _all_indices(shape, index_axis_names)
    assert index_df is not None
    by_name: dict[str, list[tuple[int, list[int]]]] = {}
    for position, (_, row) in enumerate(index_df.iterrows()):
        index = row.to_list()
        by_name.setdefault(utilities.get_act_name(activation_name, layer=index[0]), []).append((position, index))
    _check_names(model, clean_cache, by_name)
    metrics = torch.zeros(len(index_df), device=model.cfg.device)
    with as_written():
        versions = Versions(model, model, (corrupted_tokens,), list(by_name))
        for name, indices in by_name.items():
            patched = _patched(versions.activation(name), clean_cache[name], patch_setter, indices)
            for (position, _), logits in zip(indices, versions.run(name, patched), strict=True):
                metrics[position] = _number(patching_metric(logits))
    if index_axis_names is not None:
        metrics = metrics.view(shape)
    return (metrics, index_df) if return_index_df else metrics


def _sizes(model: Any, tokens: Tensor, activation_name: str, axes: Sequence[str]) -> list[int]:
    heads, positions = model.cfg.n_heads, tokens.shape[-1]
    if activation_name in ("k", "v") and model.cfg.n_key_value_heads is not None:
        heads = model.cfg.n_key_value_heads
    sizes = {"layer": model.cfg.n_layers, "head": heads, "head_index": heads}
    sizes |= dict.fromkeys(("pos", "src_pos", "dest_pos"), positions)
    if unknown := [axis for axis in axes if axis not in sizes]:
        raise InputError(f"index_axis_names: {unknown[0]!r} is unknown; known: {', '.join(sizes)}")
    return [sizes[axis] for axis in axes]


def _all_indices(sizes: Sequence[int], names: Sequence[str]) -> pandas.DataFrame:
    import pandas

    return pandas.DataFrame(list(itertools.product(*map(range, sizes))), columns=list(names))


def _check_names(model: Any, cache: Any, names: Any) -> None:
    known = {name for name, _ in model.named_modules()}
    for name in names:
        if name not in known:
            raise InputError(f"activation_name: the model has no {name}")
        if name not in cache:
            raise InputError(f"clean_cache: holds no {name}; run_with_cache with it in names_filter")


def _patched(own: Tensor, clean: Tensor, setter: Setter, indices: Any) -> Iterator[Tensor]:
    for _, index in indices:
        new = setter(own.clone(), index, clean)
        if not isinstance(new, Tensor):
            raise InputError(f"patch_setter: returned {type(new).__name__}, expected the patched activation")
        yield new


def _number(metric: Any) -> float:
    if not isinstance(metric, Tensor) or metric.numel() != 1:
        given = tuple(metric.shape) if isinstance(metric, Tensor) else type(metric).__name__
        raise InputError(f"patching_metric: expected a tensor of one element, got {given}")
    return float(metric)


def layer_pos_patch_setter(corrupted_activation: Tensor, index: Index, clean_activation: Tensor) -> Tensor:
    """index = [layer, pos] of activations (batch, pos, ...)."""
    _, pos = index
    return _set(corrupted_activation, clean_activation, pos)


def layer_pos_head_vector_patch_setter(corrupted_activation: Tensor, index: Index, clean_activation: Tensor) -> Tensor:
    """index = [layer, pos, head] of activations (batch, pos, head, ...): q, k, v, z, result."""
    _, pos, head = index
    return _set(corrupted_activation, clean_activation, pos, head)


def layer_head_vector_patch_setter(corrupted_activation: Tensor, index: Index, clean_activation: Tensor) -> Tensor:
    """index = [layer, head] of activations (batch, pos, head, ...): q, k, v, z, result."""
    _, head = index
    return _set(corrupted_activation, clean_activation, slice(None), head)


def layer_head_pattern_patch_setter(corrupted_activation: Tensor, index: Index, clean_activation: Tensor) -> Tensor:
    """index = [layer, head] of attention (batch, head, dest_pos, src_pos)."""
    _, head = index
    return _set(corrupted_activation, clean_activation, head)


def layer_head_pos_pattern_patch_setter(corrupted_activation: Tensor, index: Index, clean_activation: Tensor) -> Tensor:
    """index = [layer, head, dest_pos] of attention (batch, head, dest_pos, src_pos)."""
    _, head, to = index
    return _set(corrupted_activation, clean_activation, head, to)


def layer_head_dest_src_pos_pattern_patch_setter(
    corrupted_activation: Tensor, index: Index, clean_activation: Tensor
) -> Tensor:
    """index = [layer, head, dest_pos, src_pos] of attention (batch, head, dest_pos, src_pos)."""
    _, head, to, of = index
    return _set(corrupted_activation, clean_activation, head, to, of)


def _set(corrupted: Tensor, clean: Tensor, *where: Any) -> Tensor:
    corrupted[(slice(None), *where)] = clean[(slice(None), *where)]
    return corrupted


def _of(setter: Setter, activation: str, *axes: str) -> Callable[..., Any]:
    return partial(generic_activation_patch, patch_setter=setter, activation_name=activation, index_axis_names=axes)


# (model, corrupted_tokens, clean_cache, patching_metric) -> metrics of the shape of the axes.
get_act_patch_resid_pre = _of(layer_pos_patch_setter, "resid_pre", "layer", "pos")
get_act_patch_resid_mid = _of(layer_pos_patch_setter, "resid_mid", "layer", "pos")
get_act_patch_attn_out = _of(layer_pos_patch_setter, "attn_out", "layer", "pos")
get_act_patch_mlp_out = _of(layer_pos_patch_setter, "mlp_out", "layer", "pos")
get_act_patch_attn_head_out_by_pos = _of(layer_pos_head_vector_patch_setter, "z", "layer", "pos", "head")
get_act_patch_attn_head_q_by_pos = _of(layer_pos_head_vector_patch_setter, "q", "layer", "pos", "head")
get_act_patch_attn_head_k_by_pos = _of(layer_pos_head_vector_patch_setter, "k", "layer", "pos", "head")
get_act_patch_attn_head_v_by_pos = _of(layer_pos_head_vector_patch_setter, "v", "layer", "pos", "head")
get_act_patch_attn_head_pattern_by_pos = _of(
    layer_head_pos_pattern_patch_setter, "pattern", "layer", "head_index", "dest_pos"
)
get_act_patch_attn_head_pattern_dest_src_pos = _of(
    layer_head_dest_src_pos_pattern_patch_setter, "pattern", "layer", "head_index", "dest_pos", "src_pos"
)
get_act_patch_attn_head_out_all_pos = _of(layer_head_vector_patch_setter, "z", "layer", "head")
get_act_patch_attn_head_q_all_pos = _of(layer_head_vector_patch_setter, "q", "layer", "head")
get_act_patch_attn_head_k_all_pos = _of(layer_head_vector_patch_setter, "k", "layer", "head")
get_act_patch_attn_head_v_all_pos = _of(layer_head_vector_patch_setter, "v", "layer", "head")
get_act_patch_attn_head_pattern_all_pos = _of(layer_head_pattern_patch_setter, "pattern", "layer", "head_index")


def get_act_patch_attn_head_all_pos_every(
    model: Any, corrupted_tokens: Tensor, clean_cache: Any, metric: Metric
) -> Tensor:
    """Outputs, queries, keys, values and patterns of each head over all positions: (5, layer, head); keys and values
    of fewer heads are filled up with zeros."""
    given = model, corrupted_tokens, clean_cache, metric
    return _stacked(
        get_act_patch_attn_head_out_all_pos(*given),
        get_act_patch_attn_head_q_all_pos(*given),
        get_act_patch_attn_head_k_all_pos(*given),
        get_act_patch_attn_head_v_all_pos(*given),
        get_act_patch_attn_head_pattern_all_pos(*given),
    )


def get_act_patch_attn_head_by_pos_every(
    model: Any, corrupted_tokens: Tensor, clean_cache: Any, metric: Metric
) -> Tensor:
    """The same by position: (5, layer, pos, head); of patterns by the position that attends."""
    given = model, corrupted_tokens, clean_cache, metric
    return _stacked(
        get_act_patch_attn_head_out_by_pos(*given),
        get_act_patch_attn_head_q_by_pos(*given),
        get_act_patch_attn_head_k_by_pos(*given),
        get_act_patch_attn_head_v_by_pos(*given),
        get_act_patch_attn_head_pattern_by_pos(*given).transpose(1, 2),
    )


def get_act_patch_block_every(model: Any, corrupted_tokens: Tensor, clean_cache: Any, metric: Metric) -> Tensor:
    """The residual stream before each block, outputs of attention and of the MLP, by position: (3, layer, pos)."""
    given = model, corrupted_tokens, clean_cache, metric
    return _stacked(get_act_patch_resid_pre(*given), get_act_patch_attn_out(*given), get_act_patch_mlp_out(*given))


def _stacked(*found: Tensor) -> Tensor:
    most = max(t.shape[-1] for t in found)
    return torch.stack([torch.nn.functional.pad(t, (0, most - t.shape[-1])) for t in found])
