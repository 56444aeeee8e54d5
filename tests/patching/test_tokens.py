"""Token attribution: completeness of integrated gradients, and gradients against differences."""

import pytest
import torch

from optlens import metrics
from optlens.checks import InputError
from optlens.patching import token_attribution
from tests.patching.test_sweep import METRIC, VARIANTS, last_difference, make_model, make_prompts


def metric_from(model, tokens, embed):
    """Measure a run whose token embeddings are replaced at the hook."""
    with torch.no_grad():
        hooks = [("hook_embed", lambda value, hook: embed)]
        return last_difference(model.run_with_hooks(tokens, fwd_hooks=hooks))


@pytest.mark.parametrize("variant", ["pre-LN", "350m"])
@pytest.mark.parametrize("other", [False, True])
def test_integrated_gradients_add_up_to_the_difference(variant, other):
    model = make_model(**VARIANTS[variant] | {"activation_function": "gelu", "init_std": 0.3})
    prompts, corrupt, _, _ = make_prompts()
    start = model.run_with_cache(corrupt, "hook_embed")[1]["hook_embed"]
    found = [
        token_attribution(model, prompts, METRIC, steps=n, baseline=corrupt if other else None)
        for n in (10, 100)
    ]
    ends = [
        last_difference(model(prompts).logits.detach()),
        metric_from(model, prompts, start if other else torch.zeros_like(start)),
    ]
    torch.testing.assert_close(found[1].metric, ends[0])
    torch.testing.assert_close(found[1].baseline, ends[1])
    gaps = [each.gap.abs().max() for each in found]
    # the midpoint rule's error goes with one over the square of steps
    assert gaps[1] < 1e-3 * (ends[0] - ends[1]).abs().max()
    assert gaps[1] < 0.1 * gaps[0]
    if other:  # tokens that are the same contribute nothing
        assert (found[1].values[prompts == corrupt] == 0).all()
        assert (found[1].values[prompts != corrupt] != 0).all()


def test_input_times_gradient_is_the_slope_of_scaling_a_token():
    model = make_model()
    prompts, _, _, _ = make_prompts()
    embed = model.run_with_cache(prompts, "hook_embed")[1]["hook_embed"]
    found = token_attribution(model, prompts, METRIC, "input_x_gradient").values
    for place in range(6):
        step = torch.zeros_like(embed)
        step[:, place] = 1e-6 * embed[:, place]
        rise = metric_from(model, prompts, embed + step) - metric_from(model, prompts, embed - step)
        # central differences of float64: 1e-12 for the third order, 1e-9 for rounding
        torch.testing.assert_close(found[:, place], rise / 2e-6, atol=1e-6, rtol=1e-6)


def test_padding_gets_nothing_and_changes_nothing():
    model = make_model()
    long = torch.arange(7, 13)
    short = torch.tensor([7, 8, 20, 21])
    both = torch.stack([torch.cat([torch.tensor([1, 1]), short]), long])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    make = type(model).inputs_on_host
    model.inputs_on_host = lambda given, *a, **k: (
        (both, mask) if isinstance(given, str) else make(model, given, *a, **k)
    )
    found = token_attribution(model, "both", METRIC, steps=5)
    assert [len(row) for row in found.str_tokens] == [4, 6]
    assert (found.values[0, :2] == 0).all()
    alone = token_attribution(model, short[None], METRIC, steps=5)
    torch.testing.assert_close(found.values[0, 2:], alone.values[0])


def test_one_number_for_all_prompts():
    model = make_model()
    prompts, _, _, _ = make_prompts()
    each = token_attribution(model, prompts, METRIC, steps=5)
    mean = token_attribution(model, prompts, lambda x: last_difference(x).mean(), steps=5)
    torch.testing.assert_close(mean.values, each.values / 2)
    torch.testing.assert_close(mean.gap, each.gap.mean().expand(2))


def test_the_divergence_is_from_the_run_of_the_prompt_itself():
    model = make_model()
    prompts, corrupt, _, _ = make_prompts()
    with torch.no_grad():
        target = model(prompts).logits[:, -1].log_softmax(-1)

    def divergence(logits):
        return (target.exp() * (target - logits[:, -1].log_softmax(-1))).sum(-1)

    found, expected = (
        token_attribution(model, prompts, metric, steps=5, baseline=corrupt)
        for metric in (metrics.kl(), divergence)
    )
    torch.testing.assert_close(found.values, expected.values)
    assert found.metric.abs().max() < 1e-12
    assert found.baseline.min() > 0.01


def test_many_steps_in_half_precision_add_up_in_float32():
    """Two hundred small terms, added up in bfloat16, would be off by a quarter."""
    shape = {"activation_function": "gelu", "init_std": 0.3}
    model, exact = make_model(torch.bfloat16, **shape), make_model(**shape)
    exact.load_state_dict({name: w.double() for name, w in model.state_dict().items()})
    prompts, _, _, _ = make_prompts()
    ours, truth = (token_attribution(each, prompts, METRIC, steps=200) for each in (model, exact))
    assert ours.values.dtype == torch.float32
    # 2**-9 of rounding in each run, which differs from run to run
    atol = 0.02 * float(truth.values.abs().max())
    torch.testing.assert_close(ours.values.double(), truth.values, rtol=0, atol=atol)


def test_bad_arguments_say_what_would_be_right():
    model = make_model()
    prompts, _, _, _ = make_prompts()
    for changes, message in [
        ({"metric": None}, "what to measure"),
        ({"metric": metrics.rank(5)}, "moves in steps"),
        ({"metric": metrics.kl(), "method": "input_x_gradient"}, "vanishes there"),
        ({"method": "saliency"}, "input_x_gradient, integrated_gradients"),
        ({"steps": 0}, "at least one"),
        ({"baseline": prompts[:, :4]}, "6 and 4 tokens"),
    ]:
        with pytest.raises(InputError, match=message):
            token_attribution(model, prompts, **({"metric": METRIC} | changes))
