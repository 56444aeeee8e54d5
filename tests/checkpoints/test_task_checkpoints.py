"""Checkpoints of task heads: ours are transformers', theirs are ours, and a head that is missing is made and named."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from checkpoint_folders import IDS, make
from conftest import VARIANTS, random_model, tiny_config
from twins import assert_near, twin_of

from optlens.checkpoints import CheckpointError
from optlens.model import OPTForCausalLM, OPTModel
from optlens.task_heads import OPTForQuestionAnswering, OPTForSequenceClassification

KINDS = [OPTForSequenceClassification, OPTForQuestionAnswering]
HEAD = {OPTForSequenceClassification: "score", OPTForQuestionAnswering: "qa_outputs"}
NAMES = {0: "calm", 1: "angry", 2: "sad"}


@pytest.mark.parametrize("name", ["pre_ln", "post_ln_350m", "untied"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_saved_folders_are_read_by_both(kind, name, tmp_path):
    config = tiny_config(**VARIANTS[name], id2label=NAMES, problem_type="regression")
    model = random_model(config, kind=kind)
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    theirs = getattr(transformers, kind.__name__).from_pretrained(tmp_path).eval()
    expected = model(IDS)
    assert_near(again(IDS).main, expected.main)
    assert_near(expected[0], theirs(IDS)[0])
    assert again.config.id2label == theirs.config.id2label == NAMES
    assert again.config.problem_type == theirs.config.problem_type == "regression"
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [kind.__name__]
    if kind is OPTForSequenceClassification:
        assert written["label2id"] == {"calm": 0, "angry": 1, "sad": 2}
    assert not (tmp_path / "generation_config.json").exists()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_transformers_folders_are_read(kind, tmp_path):
    model = random_model(tiny_config(num_labels=3), kind=kind)
    twin = twin_of(model)
    twin.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = kind.from_pretrained(tmp_path)
    assert_near(again(IDS).main, model(IDS).main)
    assert again.config.num_labels == 3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_base_checkpoint_gets_a_new_head_and_says_so(kind, tmp_path):
    folder = make(tmp_path)
    base = OPTModel.from_pretrained(folder)
    heads = []
    for _ in range(2):
        torch.manual_seed(3)
        with pytest.warns(
            UserWarning, match=f"no head for an {kind.__name__}, so a new one"
        ) as said:
            model = kind.from_pretrained(folder)
        assert [warning.filename for warning in said] == [__file__]
        heads.append(dict(model.named_parameters()))
        assert_near(model.model(IDS).last_hidden_state, base(IDS).last_hidden_state)
    new = [name for name in heads[0] if not name.startswith("model.")]
    assert all(name in str(said[0].message) for name in new)
    for name in new:
        assert heads[0][name].equal(heads[1][name])  # as torch's seed says
        assert heads[0][name].requires_grad and not heads[0][name].is_meta
    weight = heads[0][new[0]]
    assert 0 < weight.std() < 2 * model.config.init_std and not model.training


def test_a_new_head_is_as_large_as_asked(tmp_path):
    with pytest.warns(UserWarning, match="a new one was drawn at random"):
        model = OPTForSequenceClassification.from_pretrained(
            make(tmp_path), num_labels=3, id2label=NAMES, problem_type="regression", dtype="float64"
        )
    assert model.score.weight.shape == (3, 32) and model.score.weight.dtype == torch.float64
    assert model.config.id2label == NAMES and model.config.problem_type == "regression"


def test_other_names_for_the_classes_of_a_checkpoint(tmp_path):
    model = random_model(tiny_config(num_labels=3), kind=OPTForSequenceClassification)
    model.save_pretrained(tmp_path)
    again = OPTForSequenceClassification.from_pretrained(
        tmp_path, label2id={"x": 0, "y": 1, "z": 2}
    )
    assert again.config.id2label == {0: "x", 1: "y", 2: "z"}
    with pytest.raises(
        CheckpointError, match=r"'score.weight' is a head of 3 outputs, but 5 are asked"
    ):
        OPTForSequenceClassification.from_pretrained(tmp_path, num_labels=5)


def test_another_tasks_head_is_left_aside(tmp_path):
    random_model(tiny_config(), kind=OPTForSequenceClassification).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no head for an OPTForQuestionAnswering"):
        OPTForQuestionAnswering.from_pretrained(tmp_path)
    OPTModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="score.weight.*load it with OPTForSequenceClass"):
        OPTForCausalLM.from_pretrained(tmp_path)


def test_half_a_head_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    random_model(tiny_config(), kind=OPTForQuestionAnswering).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["qa_outputs.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lacks 1 tensor .*qa_outputs.bias"):
        OPTForQuestionAnswering.from_pretrained(tmp_path)


def test_a_tied_language_model_still_has_no_room_for_a_head(tmp_path):
    """A `score.weight` beside a tied unembedding is a mix-up, not a head of another task."""
    folder = make(tmp_path)
    model = OPTForCausalLM.from_pretrained(folder)
    assert model.config.tie_word_embeddings
    classifier = random_model(tiny_config(), kind=OPTForSequenceClassification)
    classifier.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="sequence classifier"):
        OPTForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"device": "cpu", "device_map": "stream"},
        {"device_map": {"": "cpu", "decoder.layers.1": "disk"}},
        {"device_map": "balanced"},
        {"device": "cpu", "quantize": "int8"},
    ],
)
def test_heads_go_with_every_placement(tmp_path, kind, options: dict):
    """A new head and a stored one, on blocks that are streamed, divided or quantised."""
    folder = make(tmp_path / "base")
    with pytest.warns(UserWarning, match="so a new one was drawn at random"):
        drawn = kind.from_pretrained(folder, **options)
    assert not any(parameter.is_meta for parameter in drawn.get_submodule(HEAD[kind]).parameters())
    trained = random_model(tiny_config(), kind=kind)
    trained.save_pretrained(tmp_path / "trained")
    placed = kind.from_pretrained(tmp_path / "trained", **options)
    tolerance = 0.1 if "quantize" in options else 1e-5
    with torch.no_grad():
        drawn(IDS)
        mine, theirs = placed(IDS), trained(IDS)
    for name in ("logits", "start_logits"):
        if hasattr(theirs, name):
            expected = getattr(theirs, name)
            error = (getattr(mine, name) - expected).abs().max() / expected.abs().max()
            assert error < tolerance
