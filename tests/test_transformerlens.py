"""TransformerLens's own functions run on an optlens model and give TransformerLens's numbers.

Stored numbers: TransformerLens 2.18 on the model of `fixtures/tiny_opt.py`, by `fixtures/make_tl218.py`. Live code:
`patching` and `head_detector` of the TransformerLens that is installed (4.3). Everything is float64, so that equal means
equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from fixtures import tiny_opt
from stored_tl218 import STORED, build_model, equal, reference
from transformer_lens import head_detector, patching

from optlens.model import OPTForCausalLM

SWEEPS = [name.removeprefix("patch/") for name in STORED.files if name.startswith("patch/")]
DETECTIONS = [name.removeprefix("detect/") for name in STORED.files if name.startswith("detect/")]


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    """TransformerLens allots its result tables in torch's default type, and float32 would round them."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def model() -> OPTForCausalLM:
    return build_model()


@pytest.fixture
def clean(model: OPTForCausalLM) -> torch.Tensor:
    return model.to_tokens(tiny_opt.CLEAN)


@pytest.fixture
def corrupt(model: OPTForCausalLM) -> torch.Tensor:
    return model.to_tokens(tiny_opt.CORRUPT)


@pytest.fixture
def metric(model: OPTForCausalLM) -> Callable[[torch.Tensor], torch.Tensor]:
    right, wrong = (model.to_single_token(answer) for answer in tiny_opt.ANSWERS)
    return lambda logits: (logits[:, -1, right] - logits[:, -1, wrong]).mean()


# --- the numbers of 2.18 ---------------------------------------------------------------------------------------------


def test_tokens_logits_and_loss_equal_2_18(model, clean, corrupt):
    equal(clean, STORED["clean_tokens"])
    equal(corrupt, STORED["corrupt_tokens"])
    equal(model.to_tokens(tiny_opt.TEXT), STORED["text_tokens"])
    equal(model(clean, return_type="logits"), STORED["clean_logits"])
    equal(model(tiny_opt.CORRUPT, return_type="logits"), STORED["corrupt_logits"])
    logits, loss = model(clean, return_type="both")
    equal(logits, STORED["clean_logits"])
    equal(loss, STORED["clean_loss"])


def test_every_hook_equals_2_18(model, clean):
    _, cache = model.run_with_cache(clean, names_filter=list(model.hook_dict))
    stored = {k.removeprefix("cache/"): STORED[k] for k in STORED.files if k.startswith("cache/")}
    assert set(cache) == set(stored)
    for name, theirs in stored.items():
        ours = cache[name]
        if name.endswith("hook_normalized"):  # 2.18 shows it after gain and bias, optlens before
            ours = with_gain_and_bias(model, name, ours)
        equal(ours, theirs)


def with_gain_and_bias(model: OPTForCausalLM, name: str, value: torch.Tensor) -> torch.Tensor:
    if name.startswith("ln_final"):
        norm = model.decoder.final_layer_norm
    else:
        layer = model.decoder.layers[int(name.split(".")[1])]
        norm = layer.self_attn_layer_norm if ".ln1." in name else layer.final_layer_norm
    return value * norm.weight + norm.bias


# --- TransformerLens's own functions on our model --------------------------------------------------------------------


@pytest.mark.parametrize("sweep", SWEEPS)
def test_patching_functions_give_the_tables_of_2_18(model, clean, corrupt, metric, sweep):
    _, cache = model.run_with_cache(clean)
    function = getattr(patching, f"get_act_patch_{sweep}")
    equal(function(model, corrupt, cache, metric), STORED[f"patch/{sweep}"])


def test_every_patching_function_has_a_stored_table():
    """All but the stacked ones, tested below, and the direct-path ones, which need another kind of model."""
    names = {n.removeprefix("get_act_patch_") for n in dir(patching) if "get_act_patch_" in n}
    elsewhere = {n for n in names if n.endswith("_every") or n.startswith("direct_path")}
    assert set(SWEEPS) == names - elsewhere


def test_stacked_patching_functions_give_the_tables_of_2_18(model, clean, corrupt, metric):
    _, cache = model.run_with_cache(clean)
    given = (model, corrupt, cache, metric)
    tables = {sweep: STORED[f"patch/{sweep}"] for sweep in SWEEPS}
    parts = ("out", "q", "k", "v", "pattern")

    block = [tables[sweep] for sweep in ("resid_pre", "attn_out", "mlp_out")]
    equal(patching.get_act_patch_block_every(*given), np.stack(block))
    all_pos = [tables[f"attn_head_{part}_all_pos"] for part in parts]
    equal(patching.get_act_patch_attn_head_all_pos_every(*given), np.stack(all_pos))
    by_pos = [tables[f"attn_head_{part}_by_pos"] for part in parts]
    by_pos[-1] = by_pos[-1].swapaxes(1, 2)  # [layer, head, pos]
    equal(patching.get_act_patch_attn_head_by_pos_every(*given), np.stack(by_pos))


def test_patching_function_with_a_metric_for_each_prompt(model, clean, corrupt, metric):
    """The interface that 4.x added: values of each prompt, and the unpatched run as baseline."""
    _, cache = model.run_with_cache(clean)
    right, wrong = (model.to_single_token(answer) for answer in tiny_opt.ANSWERS)
    result = patching.get_act_patch_resid_pre(
        model,
        corrupt,
        cache,
        lambda logits: logits[:, -1, right] - logits[:, -1, wrong],
        reduce="none",
        baseline=True,
    )
    equal(result.mean(), STORED["patch/resid_pre"])
    equal(result.baseline.mean(), metric(torch.tensor(STORED["corrupt_logits"])).item())


AXES = {
    "resid_pre": ("hook_resid_pre", "p"),
    "resid_mid": ("hook_resid_mid", "p"),
    "attn_out": ("hook_attn_out", "p"),
    "mlp_out": ("hook_mlp_out", "p"),
    "attn_head_pattern_by_pos": ("attn.hook_pattern", "hq"),
    "attn_head_pattern_dest_src_pos": ("attn.hook_pattern", "hqk"),
    "attn_head_pattern_all_pos": ("attn.hook_pattern", "h"),
}
for role, site in {"out": "z", "q": "q", "k": "k", "v": "v"}.items():
    AXES[f"attn_head_{role}_by_pos"] = (f"attn.hook_{site}", "ph")
    AXES[f"attn_head_{role}_all_pos"] = (f"attn.hook_{site}", "h")


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_reference_gives_the_tables_of_2_18(sweep, metric):
    """The stored tables and the NumPy oracle agree without optlens in between."""
    site, axes = AXES[sweep]
    layout = "bhqk" if "pattern" in site else "bph"
    clean, corrupt = STORED["clean_tokens"], STORED["corrupt_tokens"]
    _, kept = reference(clean)
    table = np.zeros_like(STORED[f"patch/{sweep}"])
    for layer, *where in np.ndindex(table.shape):
        name = f"blocks.{layer}.{site}"
        index = tuple(where[axes.index(a)] if a in axes else slice(None) for a in layout)

        def put(value: np.ndarray, name: str = name, index: tuple = index) -> np.ndarray:
            value[index] = kept[name][index]
            return value

        logits, _ = reference(corrupt, edits={name: put})
        table[(layer, *where)] = metric(logits)
    equal(table, STORED[f"patch/{sweep}"])


OPTIONS = {
    "default": {},
    "exclude_bos": {"exclude_bos": True},
    "exclude_current_token": {"exclude_current_token": True},
    "abs": {"error_measure": "abs"},
}


@pytest.mark.parametrize("detection", DETECTIONS)
def test_head_detector_gives_the_scores_of_2_18(model, detection):
    head, label = detection.split("/")
    stored = STORED[f"detect/{detection}"]
    equal(head_detector.detect_head(model, tiny_opt.TEXT, head, **OPTIONS[label]), stored)

    tokens = model.to_tokens(tiny_opt.TEXT)
    _, cache = model.run_with_cache(tokens, remove_batch_dim=True)
    again = head_detector.detect_head(model, tiny_opt.TEXT, head, cache=cache, **OPTIONS[label])
    equal(again, stored)


def test_head_detector_on_several_prompts_and_chosen_heads(model):
    texts = [tiny_opt.TEXT, tiny_opt.CLEAN]
    single = [head_detector.detect_head(model, text, "previous_token_head") for text in texts]
    both = head_detector.detect_head(model, texts, "previous_token_head")
    equal(both, torch.stack(single).mean(0).numpy())

    chosen = head_detector.detect_head(
        model, tiny_opt.TEXT, "previous_token_head", heads=[(0, 2), (1, 0)]
    )
    expected = np.full((2, 4), -1.0)
    for place in ((0, 2), (1, 0)):
        expected[place] = STORED["detect/previous_token_head/default"][place]
    equal(chosen, expected)
