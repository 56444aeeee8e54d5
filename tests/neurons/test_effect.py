"""A neuron's direct effect is what an edit of it does, when nothing behind it may answer."""

import pytest
import torch
from conftest import TOL, random_model, tiny_config

import optlens
from optlens.checks import InputError
from optlens.neurons import VocabularyEffect, direct_effect, effect, vocabulary_effect

TOKENS = torch.tensor([[2, 10, 20, 30, 40]])
N_LAYERS, POS, NEURON, CHANGE = 3, 3, 17, 0.7


def frozen(cache, names):
    """Return hooks that hold values as they were."""
    return [(name, lambda value, hook: cache[hook.name]) for name in names]


def norms_behind(model, layer: int) -> list[str]:
    """Name the scales on the stream's own way to the logits."""
    if model.config.do_layer_norm_before:
        return ["ln_final.hook_scale"] if model.config.has_final_layer_norm else []
    later = [f"blocks.{i}.ln{n}.hook_scale" for i in range(layer + 1, N_LAYERS) for n in (1, 2)]
    return [f"blocks.{layer}.ln2.hook_scale", *later]


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_it_is_the_change_of_the_logits(variant, layer):
    model = random_model(tiny_config(**variant, num_hidden_layers=N_LAYERS), torch.float64)
    logits, cache = model.run_with_cache(TOKENS)
    scales = norms_behind(model, layer)
    parts = [
        f"blocks.{i}.hook_{p}_out" for i in range(layer + 1, N_LAYERS) for p in ("attn", "mlp")
    ]

    def fire_more(post, hook):
        post[0, POS, NEURON] += CHANGE

    edit = (f"blocks.{layer}.mlp.hook_post", fire_more)
    changed = model.run_with_hooks(TOKENS, fwd_hooks=[edit, *frozen(cache, scales + parts)])
    scale = torch.stack([cache[name][0, POS, 0] for name in scales]).prod() if scales else 1.0
    expected = (CHANGE / scale * direct_effect(model, layer, NEURON)).double()
    # the effect is returned in float32
    torch.testing.assert_close(
        (changed - logits)[0, POS], expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())
    )
    others = [pos for pos in range(5) if pos != POS]
    torch.testing.assert_close(changed[0, others], logits[0, others], **TOL[torch.float64])


def test_ablating_a_neuron_of_the_demo_lowers_what_it_promotes():
    """With nothing held: the last layer's neuron and the real final LayerNorm."""
    model, prompt = optlens.load(), "The cat sat on the mat. Mary gave a pen to"
    logits, cache = model.run_with_cache(prompt)
    post = cache["mlp_post", 4][0, -1]
    neuron = int(post.argmax())
    effects = direct_effect(model, 4, neuron)
    with model.intervene([optlens.Ablate("mlp_post", layer=4, neuron=neuron, mode="zero")]):
        without = model(prompt).logits[0, -1]
    fallen = (logits[0, -1] - without).detach()
    fallen, effects = fallen - fallen.mean(), effects - effects.mean()
    # the rest, here 0.06, is that the LayerNorm's scale changes with the neuron
    assert torch.corrcoef(torch.stack([fallen, effects]))[0, 1] > 0.9


def test_tokens_are_the_ends_of_the_direct_effect(variant, monkeypatch):
    model = random_model(tiny_config(**variant))
    monkeypatch.setattr(effect, "CHUNK_BYTES", 4 * 101 * 10)  # ten neurons at a time
    found = vocabulary_effect(model, neurons=slice(0, 25), k=6)
    assert found.promoted.shape == (2, 25, 6)
    for layer in range(2):
        for neuron in (0, 9, 10, 24):
            direct = direct_effect(model, layer, neuron)
            at = (layer, neuron)
            for sign, ids, values in (
                (1, found.promoted_tokens, found.promoted),
                (-1, found.suppressed_tokens, found.suppressed),
            ):
                expected = sign * (sign * direct).topk(6).values
                torch.testing.assert_close(values[at], expected, **TOL[torch.float32])
                torch.testing.assert_close(direct[ids[at]], expected, **TOL[torch.float32])
            torch.testing.assert_close(found.mean[at], direct.mean(), **TOL[torch.float32])


def test_labels_table_and_file(tmp_path):
    found = vocabulary_effect(optlens.load(), layers=2, neurons=[770, 3], k=2)
    promoted, suppressed = found.of(2, 770)
    assert [label for label, _ in promoted] == ["·It", "·The"]  # it fires on full stops
    assert promoted[0][1] > promoted[1][1] > 0 > suppressed[0][1]
    frame = found.to_dataframe()
    assert len(frame) == 8 and set(frame["side"]) == {1, -1}
    assert (
        repr(found)
        == "VocabularyEffect(2 neurons of layer 2; 2 tokens promoted, as many suppressed)"
    )
    found.save(tmp_path / "effect.safetensors")
    assert VocabularyEffect.load(tmp_path / "effect.safetensors").of(2, 770) == found.of(2, 770)


def test_labels_without_a_tokenizer_are_ids(tiny_model):
    promoted, _ = vocabulary_effect(tiny_model, 0, 0, k=1).of(0, 0)
    assert promoted[0][0].startswith("⟨")


def test_half_precision_is_near(tiny_model):
    exact = direct_effect(tiny_model, 0, 5)
    rounded = direct_effect(tiny_model.to(torch.bfloat16), 0, 5)
    torch.testing.assert_close(rounded, exact, **TOL[torch.bfloat16])


def test_wrong_requests_are_refused(tiny_model):
    with pytest.raises(InputError, match="k must be 1 to 101"):
        vocabulary_effect(tiny_model, k=102)
    with pytest.raises(InputError, match="there are 64"):
        direct_effect(tiny_model, 0, 64)
