"""The published weights give the published numbers: `pytest -m checkpoint`, for whoever has them.

Nothing is downloaded: folders are named by OPT_125M, OPT_350M and OPT_1_3B, or found in Hugging
Face's cache. The checks themselves are tested everywhere: a random model fails them all, and a
model that gives the published values passes.
"""

from functools import cache
from types import SimpleNamespace

import published_values as published
import pytest
import torch
from published_values import CHECKS, NAMES, VARIABLES, differences, folder_of

import optlens
import optlens.demo
from optlens import OPTConfig, OPTForCausalLM
from optlens.checkpoints import CheckpointError
from optlens.tokenizer import OPTTokenizer

IDS = [f"{size} {name}" for (size, _, _), name in zip(CHECKS, NAMES, strict=True)]


@cache
def published_model(size: str, dtype: str) -> OPTForCausalLM:
    return optlens.load(folder_of(size), dtype=dtype, progress=False)


@pytest.mark.checkpoint
@pytest.mark.parametrize(("size", "dtype", "check"), CHECKS, ids=IDS)
def test_published_weights_give_published_values(size: str, dtype: str, check):
    if folder_of(size) is None:
        pytest.skip(
            f"needs the weights of facebook/opt-{size}: set {VARIABLES[size]} to a folder that "
            "holds them, or have them in Hugging Face's cache; nothing is downloaded here"
        )
    with torch.no_grad():
        assert check(published_model(size, dtype)) == []


# ---------------------------------------------------------------- the checks can fail, and pass


def stand_in(size: str) -> OPTForCausalLM:
    """Return a random model of true widths, which reads with the demo's tokenizer."""
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig.from_name(size, num_hidden_layers=2)).eval()
    model.tokenizer = OPTTokenizer.from_folder(optlens.demo.path(), n_rows=50272)
    return model


def test_random_weights_fail_every_check():
    with torch.no_grad():
        for size in ("125m", "350m"):
            model = stand_in(size)
            for (wanted, _, check), name in zip(CHECKS, NAMES, strict=True):
                if wanted == size:
                    assert check(model) != [], name


class Replayed:
    """Gives the published values; `spoil` changes them a little."""

    def __init__(self, spoil: float = 0.0, text: str = "") -> None:
        self.spoil, self.text = spoil, text

    def __call__(self, ids, attention_mask=None, output_hidden_states=False):
        if output_hidden_states:
            hidden = torch.zeros(1, 11, 512)
            hidden[0, :3, :3] = torch.tensor(published.HIDDEN) + self.spoil
            return SimpleNamespace(hidden_states=[hidden])
        if ids.tolist() == [published.NAME_IDS]:
            logits = torch.zeros(1, 5, 50272, dtype=torch.float64)
            for place, token in enumerate(published.NEXT_IDS):
                share = published.NEXT_PROBS[place] + self.spoil
                logits[0, place, token] = torch.tensor(share / (1 - share) * 50271).log()
            return SimpleNamespace(logits=logits)
        means = torch.tensor(published.MEAN_LOGITS, dtype=torch.float64) + self.spoil
        return SimpleNamespace(logits=means.unsqueeze(-1).expand(-1, -1, 50272))

    def loss(self, ids):
        return torch.tensor(published.NAME_LOSS + self.spoil)

    def to_tokens(self, prompt):
        return torch.zeros(1, 4)

    def to_tokens_and_mask(self, prompts):
        return torch.zeros(2, 4), torch.ones(2, 4)

    def generate(self, prompt, new):
        if isinstance(prompt, list):
            return [self.generate(each, new) for each in prompt]
        known = dict([*published.CONTINUED[self.size], *published.PADDED, published.CONSCIOUS])
        return prompt + known[prompt] + self.text


def outcome(size: str, check, **changes) -> list[str]:
    model = Replayed(**changes)
    model.size = "350m" if size == "350m" else "125m"
    return check(model)


@pytest.mark.parametrize(("size", "dtype", "check"), CHECKS[:-1], ids=IDS[:-1])
def test_published_values_pass_and_others_do_not(size: str, dtype: str, check):
    assert outcome(size, check) == []
    assert outcome(size, check, spoil=2e-3, text="!") != []


@pytest.mark.parametrize(("number", "wrong"), [(0.0, 0), (torch.nan, 1), (torch.inf, 1)])
def test_what_is_not_finite_is_told(number: float, wrong: int):
    class Fixed(Replayed):
        def __call__(self, *given, **options):
            return SimpleNamespace(logits=torch.tensor([[0.0, number]]))

    assert len(published.check_half_is_finite(Fixed())) == wrong


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ([1.0, 2.0], []),
        ([1.0, 2.00009], []),
        ([1.0, 2.0002], ["x at [1]: 2.0002, expected 2"]),
        ([1.0, float("nan")], ["x at [1]: nan, expected 2"]),
        ([1.0], ["x: shape [1], expected [2]"]),
    ],
)
def test_differences_are_told(found: list, told: list):
    assert differences("x", found, [1.0, 2.0], 1e-4) == told


def test_a_folder_is_named_or_found_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("OPT_125M", raising=False)
    monkeypatch.setattr(published, "try_to_load_from_cache", lambda *names: None)
    assert folder_of("125m") is None
    optlens.load().save_pretrained(tmp_path)
    monkeypatch.setattr(
        published, "try_to_load_from_cache", lambda *names: str(tmp_path / "config.json")
    )
    assert folder_of("125m") == tmp_path
    (tmp_path / "model.safetensors").unlink()
    assert folder_of("125m") is None  # only its config was fetched
    monkeypatch.setenv("OPT_125M", str(tmp_path))
    with pytest.raises(CheckpointError):
        folder_of("125m")
