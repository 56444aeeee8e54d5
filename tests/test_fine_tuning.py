"""Fine-tuning with PEFT's LoRA: as transformers' models take it, hooks firing, on plain and on 8-bit weights."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from conftest import random_model, tiny_config
from torch import nn
from twins import assert_near, twin_of

from optlens.checks import InputError
from optlens.model import OPTForCausalLM
from optlens.task_heads import OPTForQuestionAnswering, OPTForSequenceClassification
from optlens.weights import effective_weight

IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
TARGETS = ["q_proj", "v_proj"]


def lora(**options) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, lora_alpha=4, **{"target_modules": TARGETS, **options})


def train(wrapped: nn.Module, steps: int, **call) -> list[float]:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([w for w in wrapped.parameters() if w.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = wrapped(**call).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_language_model_is_trained_as_transformers_is():
    """`get_peft_model` with its task type: the same losses, step by step, and the base stays as it was."""
    config = tiny_config(dropout=0.0)
    model = random_model(config, torch.float64)
    wrapped, twin = (
        peft.get_peft_model(network, lora(task_type="CAUSAL_LM"))
        for network in (model, twin_of(random_model(config, torch.float64)))
    )
    assert isinstance(wrapped, peft.PeftModelForCausalLM)
    twin.load_state_dict(wrapped.state_dict())
    before = effective_weight(model.decoder.layers[0].fc1).clone()
    call = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}
    ours, theirs = train(wrapped, 20, **call), train(twin, 20, **call)
    # their float64 loss is rounded to float32, and training passes differences on
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    assert ours[-1] < 0.7 * ours[0]
    assert effective_weight(model.decoder.layers[0].fc1).equal(before)
    assert (
        wrapped.get_nb_trainable_parameters()[0] == 2 * 2 * 2 * 2 * 32
    )  # layers, maps, sides, r, d


@torch.no_grad()
def test_a_wrapped_model_writes_on():
    config = tiny_config(eos_token_id=None)
    model = random_model(config, torch.float64)
    plain = model.generate(IDS, 6, attention_mask=MASK)
    wrapped = peft.get_peft_model(model, lora(task_type="CAUSAL_LM", init_lora_weights=False))
    twin = peft.get_peft_model(
        twin_of(random_model(config, torch.float64)), lora(task_type="CAUSAL_LM")
    )
    twin.load_state_dict(wrapped.state_dict())
    call = {"attention_mask": MASK, "max_new_tokens": 6}
    theirs = twin.eval().generate(input_ids=IDS, do_sample=False, **call)
    assert wrapped.generate(input_ids=IDS, **call).equal(theirs)
    assert wrapped.generate(IDS, **call).equal(theirs)
    assert not theirs.equal(plain)


def test_hooks_and_weights_show_the_adapter(tmp_path):
    """While it trains, when it is merged, and after it is reloaded from its folder."""
    plain, model = random_model(tiny_config()), random_model(tiny_config())
    wrapped = peft.get_peft_model(
        model, lora(task_type="CAUSAL_LM", init_lora_weights=False)
    ).eval()
    logits, cache = model.run_with_cache(IDS)
    assert_near(wrapped(input_ids=IDS).logits, logits)
    assert_near(
        cache["q", 0],
        torch.einsum(
            "bpd,hde->bphe",
            cache["normalized", 0, "ln1"] * gain(model) + shift(model),
            model.W_Q[0],
        )
        + model.b_Q[0],
    )
    assert torch.linalg.matrix_rank((model.W_Q - plain.W_Q)[0].transpose(0, 1).flatten(1)) == 2
    ablated = wrapped(input_ids=IDS).logits
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: 0 * z)]):
        assert not torch.allclose(wrapped(input_ids=IDS).logits, ablated)

    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(random_model(tiny_config()), tmp_path)
    assert isinstance(again, peft.PeftModelForCausalLM)
    assert_near(again(input_ids=IDS).logits, logits)
    with again.disable_adapter():
        assert_near(again(input_ids=IDS).logits, plain(IDS).logits)
    theirs = peft.PeftModel.from_pretrained(twin_of(plain), tmp_path)
    assert_near(theirs(input_ids=IDS).logits, logits)

    merged = again.merge_and_unload()
    assert type(merged) is OPTForCausalLM
    assert_near(merged(IDS).logits, logits)
    assert_near(merged.W_V, model.W_V)
    merged.save_pretrained(tmp_path / "merged")
    assert_near(OPTForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits, logits)


def gain(model: OPTForCausalLM) -> torch.Tensor:
    return model.decoder.layers[0].self_attn_layer_norm.weight


def shift(model: OPTForCausalLM) -> torch.Tensor:
    return model.decoder.layers[0].self_attn_layer_norm.bias


def test_an_injected_adapter_trains_in_the_models_own_calls():
    model = peft.inject_adapter_in_model(lora(), random_model(tiny_config(dropout=0.0)))
    assert type(model) is OPTForCausalLM
    losses = train(model, 20, input_ids=IDS, labels=IDS)
    assert losses[-1] < 0.7 * losses[0]
    gradients = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert gradients and all("lora_" in name for name in gradients)
    recording = model.record(IDS, what=("attention", "residual"))
    assert torch.allclose(recording.attention.sum(-1), torch.ones(()))


@pytest.mark.parametrize(
    ("kind", "task", "head", "call"),
    [
        (OPTForSequenceClassification, "SEQ_CLS", "score", {"labels": torch.tensor([0, 2])}),
        (
            OPTForQuestionAnswering,
            "QUESTION_ANS",
            "qa_outputs",
            {"start_positions": torch.tensor([2, 1]), "end_positions": torch.tensor([3, 6])},
        ),
    ],
)
def test_task_heads_are_trained_with_the_adapter(kind, task, head, call, tmp_path):
    """PEFT trains the head itself beside the adapter, and saves both."""
    config = tiny_config(dropout=0.0, num_labels=3)
    model = random_model(config, kind=kind)
    wrapped = peft.get_peft_model(model, lora(task_type=task))
    losses = train(wrapped, 20, input_ids=IDS, **call)
    assert losses[-1] < 0.5 * losses[0]
    trained = {name for name, weight in wrapped.named_parameters() if weight.requires_grad}
    assert all("lora_" in name or head in name for name in trained)
    assert any(head in name for name in trained)
    wrapped.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected, cache = model.run_with_cache(IDS)
        assert "blocks.1.attn.hook_pattern" in cache
        again = peft.PeftModel.from_pretrained(random_model(config, kind=kind), tmp_path)
        assert_near(again.get_base_model()(IDS).main, expected)
        merged = wrapped.merge_and_unload()
        assert_near(merged(IDS).main, expected)
        merged.save_pretrained(tmp_path / "merged")
        assert_near(kind.from_pretrained(tmp_path / "merged")(IDS).main, expected)


# --- steps of decoding, which PEFT asks for -------------------------------------------------------------------------------


@torch.no_grad()
def test_inputs_of_each_decoding_step():
    model = random_model(tiny_config(), torch.float64)
    prepare = model.prepare_inputs_for_generation
    cache, mask, steps = None, MASK, IDS
    for length in (5, 6, 7):
        step = prepare(IDS[:, :length], cache, MASK[:, :length], output_attentions=True)
        assert step["input_ids"].shape[1] == (5 if cache is None else 1)
        out = model(**step)
        cache = out.past_key_values
        assert out.attentions is not None
    whole = model(IDS, attention_mask=MASK).logits[:, -1]
    assert_near(out.logits[:, -1], whole)
    with pytest.raises(InputError, match="The cache holds 7 tokens of 7: there is no new token"):
        prepare(steps, cache, mask)


@torch.no_grad()
def test_decoding_steps_after_embeddings():
    """Ids hold the prompt, or only what came after it, as decoding loops have it either way."""
    model = random_model(tiny_config(), torch.float64)
    embeds = model.get_input_embeddings()(IDS[:, :5])
    step = model.prepare_inputs_for_generation(IDS[:, :0], inputs_embeds=embeds)
    assert "input_ids" not in step
    cache = model(**step).past_key_values
    for ids in (IDS[:, :6], IDS[:, 5:6]):
        step = model.prepare_inputs_for_generation(
            ids, cache, torch.ones(2, 6), inputs_embeds=embeds
        )
        assert step["input_ids"].equal(IDS[:, 5:6]) and "inputs_embeds" not in step


# --- 8-bit weights --------------------------------------------------------------------------------------------------------


def in_8_bits(model: OPTForCausalLM) -> OPTForCausalLM:
    """Put every linear layer of the blocks into 8 bits, as users of bitsandbytes do it."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="8-bit weights need bitsandbytes")
    for path, module in list(model.decoder.layers.named_modules()):
        if isinstance(module, nn.Linear):
            small = bitsandbytes.nn.Linear8bitLt(
                module.in_features,
                module.out_features,
                module.bias is not None,
                has_fp16_weights=False,
            )
            small.load_state_dict(module.state_dict())
            parent, _, name = path.rpartition(".")
            setattr(model.decoder.layers.get_submodule(parent), name, small.to(model.device))
    return model.eval()


@torch.no_grad()
def test_8_bit_weights_are_read_as_what_they_stand_for():
    plain = random_model(tiny_config())
    model = in_8_bits(random_model(tiny_config()))
    assert model.is_loaded_in_8bit and not plain.is_loaded_in_8bit
    for _ in ("as quantised", "after a pass, which moves the scales"):
        for name in ("W_Q", "W_O", "W_in"):
            rows = getattr(plain, name)
            # each row is rounded to 127ths of its largest number, by half of one at most; float16 on the way
            assert (getattr(model, name) - rows).abs().max() <= 0.51 / 127 * rows.abs().max()
        clean = model(IDS).logits
    assert_near(clean, plain(IDS).logits, 0.1)
    hooks = [("blocks.0.attn.hook_result", lambda value, hook: value.clone())]
    assert_near(model.run_with_hooks(IDS, fwd_hooks=hooks), clean, 0.02)
    hooks = [("blocks.0.hook_q_input", lambda value, hook: value.clone())]
    assert_near(model.run_with_hooks(IDS, fwd_hooks=hooks), clean, 0.1)


def test_an_adapter_on_an_8_bit_base(tmp_path):
    """It trains, the base stays in 8 bits, the weights show both, and merging stays in 8 bits."""
    model = in_8_bits(random_model(tiny_config(dropout=0.0)))
    query = model.decoder.layers[0].self_attn.q_proj
    base, before = query.weight.data.clone(), model.W_Q.clone()
    wrapped = peft.get_peft_model(model, lora(task_type="CAUSAL_LM"))
    layer = model.decoder.layers[0].self_attn.q_proj
    assert type(layer).__name__ == "Linear8bitLt" and hasattr(
        layer, "lora_A"
    )  # PEFT's own for 8 bits
    losses = train(wrapped.train(), 30, input_ids=IDS, labels=IDS)
    assert losses[-1] < 0.7 * losses[0]
    assert query.weight.dtype == torch.int8 and query.weight.data.equal(base)
    wrapped.eval()
    with torch.no_grad():
        update = layer.get_delta_weight("default")
        assert_near(model.W_Q[0].flatten(0, 1), before[0].flatten(0, 1) + per_head(update), 1e-6)
        logits, cache = model.run_with_cache(IDS, "blocks.1.attn.hook_pattern")
        wrapped.save_pretrained(tmp_path)
        fresh = in_8_bits(random_model(tiny_config(dropout=0.0)))
        again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
        assert_near(again(input_ids=IDS).logits, logits, 1e-6)
        weight = model.W_Q
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, that merging rounds anew
            merged = wrapped.merge_and_unload()
        assert merged.is_loaded_in_8bit
        assert (merged.W_Q - weight).abs().max() <= 0.51 / 127 * weight.abs().max()


def per_head(weight: torch.Tensor) -> torch.Tensor:
    """Lay a checkpoint's matrix out as `W_Q` has it, heads and d_model flattened."""
    return weight.unflatten(0, (4, 8)).transpose(1, 2).flatten(0, 1)


def test_weights_in_other_formats_are_refused():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match="Cannot read the weight of a .*Linear; optlens knows"):
        effective_weight(linear)
