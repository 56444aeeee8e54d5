"""The task heads equal transformers' in outputs, losses and gradients, and can be listened to as the rest."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from conftest import VARIANTS, random_model, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from test_model import configs, passes
from torch import nn
from twins import assert_near, examples, twin_of

import optlens
from optlens import Ablate
from optlens.checks import InputError
from optlens.config import OPTConfig
from optlens.labels import PROBLEM_TYPES, LabelError, label_fields
from optlens.task_heads import OPTForQuestionAnswering, OPTForSequenceClassification

IDS = torch.randint(3, 101, (2, 7), generator=torch.manual_seed(5))
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
STILL = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}


def classifier(
    dtype: torch.dtype = torch.float64, **overrides: Any
) -> OPTForSequenceClassification:
    config = tiny_config(**{**STILL, "num_labels": 3, **overrides})
    return random_model(config, dtype, kind=OPTForSequenceClassification)


def answerer(dtype: torch.dtype = torch.float64, **overrides: Any) -> OPTForQuestionAnswering:
    return random_model(tiny_config(**STILL, **overrides), dtype, kind=OPTForQuestionAnswering)


def padded(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": IDS.masked_fill(mask == 0, 1), "attention_mask": mask}


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    """Relative to the largest of all gradients."""
    largest = max(w.grad.abs().max().item() for w in theirs.parameters() if w.grad is not None)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}[ours.dtype]
    for name, weight in ours.named_parameters():
        other = theirs.get_parameter(name)
        mine, other = (
            torch.zeros_like(weight) if w.grad is None else w.grad for w in (weight, other)
        )
        torch.testing.assert_close(
            mine, other, rtol=0, atol=tolerance * largest, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert largest > 0


def backward(model: nn.Module, **call: Any) -> Any:
    model.zero_grad()
    out = model(**call)
    out.loss.backward()
    return out


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(config=configs(), run=passes(), seed=st.integers(0, 10**6), labels=st.integers(1, 4))
@examples(150)
@torch.no_grad()
def test_classifiers_logits_equal_transformers(dtype, config, run, seed, labels):
    """With and without a mask, whatever ids are the padding's, in chunks, and of prompts that are padding alone."""
    config.num_labels = labels
    model = random_model(config, dtype, seed, OPTForSequenceClassification)
    twin = twin_of(model)
    results, start, caches = [], 0, {model: None, twin: None}
    for end in run.ends:
        mask = None if run.mask is None else run.mask[:, :end]
        call = {"input_ids": run.ids[:, start:end], "attention_mask": mask, "use_cache": True}
        if config.pad_token_id is None and len(run.ids) > 1:
            for network in (model, twin):
                with pytest.raises(ValueError, match="padding token"):
                    network(**call)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a classifying token that the mask calls padding
            outs = [network(**call, past_key_values=caches[network]) for network in caches]
        caches = {network: out.past_key_values for network, out in zip(caches, outs, strict=True)}
        results.append((run.real[:, :end], start, end, *(out.logits for out in outs)))
        start = end
    for real, start, end, ours, theirs in results:
        assert ours.shape == (len(run.ids), labels) and ours.dtype == dtype
        pad = -1 if config.pad_token_id is None else config.pad_token_id
        is_padding = run.ids[:, start:end] == pad
        last = ((~is_padding).long() * torch.arange(end - start)).argmax(-1) + start
        # a token that sees no other and is padding itself is 0/0 there
        seen = torch.stack([row[: at + 1].any() for row, at in zip(real, last, strict=True)])
        assert_near(ours[seen], theirs[seen])


@given(config=configs(), run=passes(), seed=st.integers(0, 10**6))
@examples(100)
@torch.no_grad()
def test_answerers_logits_equal_transformers(config, run, seed):
    model = random_model(config, torch.float64, seed, OPTForQuestionAnswering)
    call = {"input_ids": run.ids, "attention_mask": run.mask, "output_hidden_states": True}
    ours, theirs = model(**call), twin_of(model)(**call)
    for name in ("start_logits", "end_logits"):
        assert_near(ours[name][run.real], theirs[name][run.real])
    assert_near(ours.hidden_states[-1][run.real], theirs.hidden_states[-1][run.real])


@pytest.mark.parametrize("kind", [OPTForSequenceClassification, OPTForQuestionAnswering])
@torch.no_grad()
def test_from_embeddings(kind, variant):
    """Where padding cannot be seen: transformers reads the last column."""
    model = random_model(tiny_config(**variant), torch.float64, kind=kind)
    embeds = model.get_input_embeddings()(IDS)
    ours = model(inputs_embeds=embeds, attention_mask=LEFT)
    theirs = twin_of(model)(inputs_embeds=embeds, attention_mask=LEFT)
    for mine, other in zip(ours.to_tuple()[:1], theirs.to_tuple()[:1], strict=True):
        at = LEFT.bool() if kind is OPTForQuestionAnswering else slice(None)
        assert_near(mine[at], other[at])


@torch.no_grad()
def test_the_same_prompt_alone_and_padded_on_either_side():
    model = classifier()
    for mask in (LEFT, RIGHT):
        together = model(**padded(mask)).logits
        for row, real in enumerate(mask.bool()):
            assert_near(together[row], model(IDS[row][real]).logits[0])


@torch.no_grad()
def test_half_precision_runs():
    exact = classifier()
    for dtype in (torch.bfloat16, torch.float16):
        model = random_model(exact.config, dtype, kind=OPTForSequenceClassification)
        out = model(IDS, labels=torch.tensor([0, 2]))
        assert out.logits.dtype == dtype and out.loss.dtype == torch.float32
        torch.testing.assert_close(out.logits.double(), exact(IDS).logits, rtol=0.05, atol=0.05)


def test_fields_come_in_transformers_order():
    model, twin = classifier(), twin_of(classifier())
    call = {
        "input_ids": IDS,
        "labels": torch.tensor([0, 2]),
        "output_hidden_states": True,
        "use_cache": False,
    }
    ours, theirs = model(**call), twin(**call)
    for mine, other in zip(ours.to_tuple()[:2], theirs.to_tuple()[:2], strict=True):
        assert_near(mine, other)
    assert len(ours.to_tuple()) == len(theirs.to_tuple()) == 3
    as_tuple = model(**call, return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[1].equal(ours.logits)
    spans = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 3])}
    ours, theirs = answerer()(IDS, **spans), twin_of(answerer())(IDS, **spans)
    for mine, other in zip(ours.to_tuple(), theirs.to_tuple(), strict=True):
        assert_near(mine, other)
    assert ours[1].equal(ours.start_logits) and ours["end_logits"].equal(ours[2])
    assert ours[0, 3, 1] == ours.end_logits[0, 3]


def test_parameters_have_transformers_names():
    for model in (classifier(), answerer(), classifier(**VARIANTS["post_ln_350m"])):
        assert model.state_dict().keys() == twin_of(model).state_dict().keys()


# --- losses and gradients ----------------------------------------------------------------------------------------------

CLASSES = torch.tensor([2, 0])
VALUES = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]])
PRESENT = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
CASES = {
    "classes, inferred": (3, None, CLASSES),
    "classes": (3, "single_label_classification", CLASSES),
    "classes, one ignored": (3, "single_label_classification", torch.tensor([1, -100])),
    "classes in a column": (3, "single_label_classification", CLASSES[:, None]),
    "a value each, inferred": (1, None, VALUES[:, 0]),
    "a value each, in a column": (1, "regression", VALUES[:, :1]),
    "values": (3, "regression", VALUES),
    "present or not, inferred": (3, None, PRESENT),
    "present or not": (3, "multi_label_classification", PRESENT),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["whole", "left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_classifiers_losses_and_gradients_equal_transformers(case, mask, dtype):
    number, kind, labels = CASES[case]
    model = classifier(dtype, num_labels=number, problem_type=kind).train()
    twin = twin_of(model)
    labels = labels.to(dtype) if labels.is_floating_point() else labels
    call = (
        {"input_ids": IDS, "labels": labels} if mask is None else {**padded(mask), "labels": labels}
    )
    ours, theirs = backward(model, **call), backward(twin, **call)
    assert_near(ours.loss, theirs.loss)
    assert_near(ours.logits, theirs.logits)
    assert_same_gradients(model, twin)
    assert model.config.problem_type == twin.config.problem_type


@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["whole", "left", "right"])
def test_gradients_of_every_variant_equal_transformers(variant, mask):
    inputs = {"input_ids": IDS} if mask is None else padded(mask)
    spans = {"start_positions": torch.tensor([3, 2]), "end_positions": torch.tensor([4, 9])}
    for model, call in (
        (classifier(**variant), {"labels": CLASSES}),
        (answerer(**variant), spans),  # the second end lies behind the prompt
    ):
        model.train()
        twin = twin_of(model)
        ours, theirs = backward(model, **inputs, **call), backward(twin, **inputs, **call)
        if mask is LEFT and isinstance(model, OPTForQuestionAnswering):
            continue  # logits of left padding, which are undefined, are part of that softmax
        assert_near(ours.loss, theirs.loss)
        assert_same_gradients(model, twin)


@pytest.mark.parametrize("start", [[0, 6], [2, 7], [9, 1]])
@pytest.mark.parametrize("end", [[[0], [6]], [[100], [3]]])
def test_spans_behind_the_prompt_do_not_count(start, end):
    model = answerer().train()
    twin = twin_of(model)
    call = {
        "input_ids": IDS,
        "start_positions": torch.tensor(start),
        "end_positions": torch.tensor(end),
    }
    ours, theirs = backward(model, **call), backward(twin, **call)
    assert_near(ours.loss, theirs.loss)
    assert_same_gradients(model, twin)


def test_whole_numbers_of_any_kind_are_labels():
    """Which PyTorch's losses are particular about, and transformers passes on."""
    model = classifier()
    loss = model(IDS, labels=CLASSES).loss
    assert model(IDS, labels=CLASSES.int()).loss == loss
    present = classifier(problem_type="multi_label_classification")
    assert present(IDS, labels=PRESENT.bool()).loss == present(IDS, labels=PRESENT).loss
    value = classifier(num_labels=1)
    assert value(IDS, labels=CLASSES).loss == value(IDS, labels=CLASSES.double()).loss


def test_a_plain_loop_learns():
    """To tell which of two tokens a prompt holds, wherever it stands."""
    torch.manual_seed(0)
    model = OPTForSequenceClassification(tiny_config(**STILL, init_std=0.2)).train()
    ids = torch.randint(10, 101, (64, 6))
    labels = torch.arange(64) % 2
    ids[torch.arange(64), torch.randint(0, 6, (64,))] = 5 + labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = None
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        first = loss.item() if first is None else first
    assert loss.item() < 0.2 * first
    assert (model.eval()(ids).logits.argmax(-1) == labels).all()


# --- hooks, recordings, interventions ----------------------------------------------------------------------------------


@torch.no_grad()
def test_the_stack_is_the_language_models():
    """Every hook has the value it has there, and the head reads what the unembedding reads."""
    language = random_model(tiny_config(), torch.float64)
    _, expected = language.run_with_cache(IDS, attention_mask=LEFT)
    for model in (classifier(), answerer()):
        model.model.load_state_dict(language.model.state_dict())
        logits, cache = model.run_with_cache(IDS, attention_mask=LEFT)
        assert set(cache) == set(expected)
        for name, value in cache.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
        assert_near(logits, model(IDS, attention_mask=LEFT).main)
        recording = model.record(IDS, what=("attention", "z"), attention_mask=LEFT)
        assert_near(recording.attention, expected.stack("pattern").transpose(0, 1))
        assert_near(recording["z"], expected.stack("z").transpose(0, 1))


@torch.no_grad()
def test_edits_reach_the_answer():
    for model in (classifier(), answerer()):
        clean = model(IDS).main
        hooks = [("blocks.1.attn.hook_z", lambda value, hook: 0 * value)]
        edited = model.run_with_hooks(IDS, fwd_hooks=hooks)
        assert not torch.allclose(edited, clean)
        with model.intervene(Ablate("z", layer=1, mode="zero")):
            assert_near(model(IDS).main, edited)
        assert_near(model(IDS).main, clean)


@torch.no_grad()
def test_running_a_part_of_the_layers():
    for model in (classifier(), answerer()):
        clean = model(IDS).main
        resid = model(IDS, stop_at_layer=1)
        assert resid.shape == (2, 7, 32)
        assert_near(model(resid, start_at_layer=1).main, clean)
        with pytest.raises(InputError, match="stop_at_layer=1 returns the residual stream alone"):
            model(IDS, stop_at_layer=1, return_type="logits")


def test_gradients_of_the_loss_at_hooks():
    model = classifier()
    loss, cache = model.run_with_cache(
        IDS, "blocks.1.hook_resid_post", return_type="loss", incl_bwd=True, labels=CLASSES
    )
    gradient = cache["blocks.1.hook_resid_post_grad"]
    assert (gradient[:, -1] != 0).any() and (gradient[:, :-1] == 0).all()
    assert loss == model(IDS, labels=CLASSES).loss
    both = model(IDS, labels=CLASSES, return_type="both")
    assert both[0].equal(model(IDS, return_type="logits")) and both[1] == loss


def test_text_goes_in_as_it_does_elsewhere():
    base = optlens.load()
    torch.manual_seed(0)
    model = OPTForSequenceClassification(base.config).eval()
    model.model.load_state_dict(base.model.state_dict())
    model.tokenizer = base.tokenizer
    texts = ["The cat sat on the mat.", "A dog"]
    together = model(texts).logits
    for row, text in zip(together, texts, strict=True):
        assert_near(row, model(text).logits[0], 1e-5)


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "labels", "message"),
    [
        ({}, torch.tensor([0, 3]), r"Label 3 of prompt 1 is no class; they are 0 to 2, and -100"),
        ({}, torch.tensor([-1, 0]), r"Label -1 of prompt 0 is no class"),
        ({}, torch.tensor([-100, -100]), r"No label counts: all are -100"),
        (
            {},
            torch.tensor([0, 1, 2]),
            r"shape \(3,\); single_label_classification of 3 labels expects \(2,\)",
        ),
        ({}, PRESENT.long(), r"expects \(2,\)\. Ones and zeros for each class are labels of multi"),
        (
            {},
            torch.tensor([0.5, 1.0]),
            r"\(2,\); multi_label_classification of 3 labels expects \(2, 3\)",
        ),
        ({}, VALUES, r"whether it is there, 0 to 1; got values from -1.0 to 2.0"),
        (
            {"problem_type": "single_label_classification"},
            torch.tensor([0.0, 1.0]),
            r"whole numbers, got torch.float32",
        ),
        (
            {"num_labels": 1},
            torch.tensor([1.0]),
            r"shape \(1,\); regression of 1 labels expects \(2,\)",
        ),
        ({}, [0, 1], r"labels must be a tensor, got a list"),
    ],
)
def test_labels_that_do_not_fit_say_why(settings, labels, message):
    model = classifier(**settings)
    with pytest.raises(InputError, match=message):
        model(IDS, labels=labels)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (
            torch.tensor([-1, 2]),
            torch.tensor([3, 3]),
            r"start_positions holds -1; .* Give 7 or more for an answer",
        ),
        (
            torch.tensor([1, 2]),
            torch.tensor([7, 8]),
            r"end_positions: no position counts, as all lie behind .* 6\.",
        ),
        (
            torch.tensor([1.0, 2.0]),
            torch.tensor([3, 3]),
            r"start_positions has shape \(2,\) and dtype torch.float32",
        ),
        (torch.tensor([1, 2]), torch.tensor([3]), r"end_positions has shape \(1,\)"),
        (torch.tensor([1, 2]), None, r"Give both start_positions and end_positions"),
    ],
)
def test_spans_that_do_not_fit_say_why(start, end, message):
    with pytest.raises(InputError, match=message):
        answerer()(IDS, start_positions=start, end_positions=end)


def test_a_loss_needs_something_to_compare_with():
    with pytest.raises(
        InputError, match=r"return_type='loss' needs what the loss compares with: labels="
    ):
        classifier()(IDS, return_type="loss")
    with pytest.raises(InputError, match=r"needs what .* start_positions= and end_positions="):
        answerer().run_with_cache(IDS, return_type="both")


def test_a_failed_call_leaves_the_cache_and_the_config():
    model = classifier()
    past = model(IDS[:, :3], use_cache=True).past_key_values
    with pytest.raises(InputError, match="is no class"):
        model(IDS[:, 3:], past_key_values=past, labels=torch.tensor([0, 9]))
    assert past.get_seq_length() == 3 and model.config.problem_type is None


def test_being_classified_by_padding_is_said():
    """Which transformers does in silence: padded with another id than the config's, or from embeddings."""
    model = classifier()
    with pytest.warns(
        UserWarning, match="Prompt 0 is classified by a token that .* calls padding"
    ) as said:
        model(IDS, attention_mask=RIGHT)
    assert said[0].filename == __file__
    with pytest.warns(UserWarning, match="Prompt 0 is classified"):
        model(inputs_embeds=model.get_input_embeddings()(IDS), attention_mask=RIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**padded(RIGHT))
        model(**padded(LEFT))


# --- labels in the config ----------------------------------------------------------------------------------------------


def test_label_fields_of_a_config():
    config = OPTConfig()
    assert (config.num_labels, config.problem_type) == (2, None)
    assert "id2label" not in config.to_dict()  # of a language model nobody asks
    config.num_labels = 3
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    stored = OPTConfig.from_dict({"id2label": {"1": "angry", "0": "calm"}})
    assert stored.id2label == {0: "calm", 1: "angry"} and stored.num_labels == 2
    assert OPTConfig(num_labels=4).to_dict()["num_labels"] == 4
    resized = OPTConfig(num_labels=4)
    resized.num_labels = 5
    assert resized.num_labels == 5 and "num_labels" not in resized.to_dict()
    stored.num_labels = 2
    assert stored.id2label[1] == "angry"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_labels": 0}, "num_labels must be a positive whole number, got 0"),
        ({"num_labels": "two"}, "positive whole number, got 'two'"),
        ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, "num_labels is 3, but id2label names 2"),
        ({"id2label": {0: "a", 2: "b"}}, r"must name the classes 0 to 1, got \[0, 2\]"),
        ({"id2label": ["a", "b"]}, "must be a table of class number to name"),
        ({"problem_type": "ranking"}, "problem_type must be one of regression, .*, got 'ranking'"),
        ({"num_labels": 1, "problem_type": PROBLEM_TYPES[1]}, "needs at least two classes"),
    ],
)
def test_labels_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(LabelError, match=message):
        OPTForSequenceClassification(tiny_config(**values))


def test_labels_as_a_caller_gives_them():
    assert label_fields() == {}
    assert label_fields(2)["id2label"] == {0: "LABEL_0", 1: "LABEL_1"}
    named = {0: "calm", 1: "angry"}
    assert label_fields(label2id={"calm": 0, "angry": 1}) == {"id2label": named}
    assert (
        label_fields(2, named, {"calm": 0, "angry": 1}, "regression")["problem_type"]
        == "regression"
    )
    with pytest.raises(LabelError, match="name different classes"):
        label_fields(id2label=named, label2id={"calm": 1, "angry": 0})
    with pytest.raises(LabelError, match="num_labels=3, but 2 classes are named"):
        label_fields(3, named)
