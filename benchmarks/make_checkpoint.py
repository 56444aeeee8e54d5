"""Make a stand-in checkpoint: an OPT's true shapes, random weights, in any of the layouts on the Hub.

    python benchmarks/make_checkpoint.py /big/disk/opt-125m --size 125m
    python benchmarks/make_checkpoint.py /big/disk/opt-6.7b --size 6.7b --layout sharded --dtype float16
    python benchmarks/make_checkpoint.py tiny --size 125m --set num_hidden_layers=2 --layout bin

A tensor depends only on the seed and its name, so two folders made with the same seed hold the same
model whatever their layout and spelling. Safetensors are written tensor by tensor, so any size can
be made with the memory of its embedding; a `.bin` file is held in memory once, so large models want
`--layout sharded-bin`.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from optlens.checkpoints.empty import empty_model
from optlens.checkpoints.layout import SAFETENSORS, SAFETENSORS_INDEX, TORCH, TORCH_INDEX
from optlens.checkpoints.safetensors_file import write_safetensors
from optlens.config import OPTConfig
from optlens.model import OPTForCausalLM

EMBEDDING, HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"
LAYOUTS = ("safetensors", "sharded", "bin", "sharded-bin")
# How the published files spell a tied model. An untied one has its lm_head in each.
DIALECTS = {
    "model": "model.decoder.* and the tied lm_head: 125m, 1.3b, 2.7b, 66b",
    "model-no-head": "model.decoder.* alone, as transformers saves safetensors",
    "decoder": "decoder.* alone: 350m, 6.7b, 13b, 30b",
    "decoder-version": "the same with fairseq's decoder.version",
    "head-only": "the tied matrix under the name lm_head.weight alone",
}
# What Hub configs carry beside the fields of an OPT.
STALE_KEYS = {"prefix": "</s>", "activation_dropout": 0.0, "output_projection": True}

Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]


def make_checkpoint(
    folder: Path,
    config: OPTConfig,
    layout: str = "safetensors",
    dialect: str = "model-no-head",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_bytes: int = 2 * 10**9,
    legacy: bool = False,
) -> None:
    """Write a checkpoint folder.

    Args:
        folder: Where to write; made if it does not exist.
        config: The model's shape.
        layout: One of `LAYOUTS`.
        dialect: One of `DIALECTS`.
        dtype: Of all tensors.
        seed: Of the random weights.
        max_shard_bytes: Size of a shard in the sharded layouts.
        legacy: Write `.bin` files as PyTorch did before 1.6.
    """
    folder.mkdir(parents=True, exist_ok=True)
    specs, drawn_as = stored_names(config, dialect, dtype)

    def tensor(name: str) -> Tensor:
        shape, kind = specs[name]
        return draw(drawn_as[name], shape, seed).to(kind)

    is_bin = layout.endswith("bin")
    single, index_name = (TORCH, TORCH_INDEX) if is_bin else (SAFETENSORS, SAFETENSORS_INDEX)
    groups = split(specs, max_shard_bytes) if layout.startswith("sharded") else [list(specs)]
    stem, suffix = single.rsplit(".", 1)
    files = {single: groups[0]}
    if layout.startswith("sharded"):
        count = len(groups)
        files = {f"{stem}-{i:05d}-of-{count:05d}.{suffix}": g for i, g in enumerate(groups, 1)}
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(math.prod(shape) * kind.itemsize for shape, kind in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / index_name).write_text(json.dumps(index, indent=2))
    for file, names in files.items():
        if is_bin:
            write_bin(folder / file, names, drawn_as, tensor, legacy)
        else:
            write_safetensors(folder / file, {name: specs[name] for name in names}, tensor)
    values = {**STALE_KEYS, **config.to_dict(), "architectures": ["OPTForCausalLM"]}
    values["torch_dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(values, indent=2))


def stored_names(
    config: OPTConfig, dialect: str, dtype: torch.dtype
) -> tuple[Specs, dict[str, str]]:
    """Return stored name -> shape and dtype, and stored name -> name that the numbers follow."""
    model = empty_model(OPTForCausalLM, config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    spelt = {name: name for name in shapes}
    if config.tie_word_embeddings and dialect == "model":
        spelt[HEAD] = EMBEDDING
    if config.tie_word_embeddings and dialect == "head-only":
        spelt[HEAD] = spelt.pop(EMBEDDING)
    if dialect.startswith("decoder"):
        spelt = {name.removeprefix("model."): source for name, source in spelt.items()}
    specs: Specs = {name: (shapes[source], dtype) for name, source in spelt.items()}
    if dialect == "decoder-version":
        spelt["decoder.version"] = "decoder.version"
        specs["decoder.version"] = ((1,), torch.float32)
    return specs, spelt


def draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return random weights of a sensible scale; gains and biases are not trivially 1 and 0."""
    generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.1 * noise
    if len(shape) == 1:  # the gain of a LayerNorm
        return 1 + 0.2 * noise
    if "embed" in name or name == HEAD:
        return 0.05 * noise
    return noise / math.sqrt(shape[-1])


def split(specs: Specs, limit: int) -> list[list[str]]:
    """Distribute names, in order, over files of at most `limit` bytes."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, (shape, dtype) in specs.items():
        n_bytes = math.prod(shape) * dtype.itemsize
        if groups[-1] and size + n_bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += n_bytes
    return groups


def write_bin(
    path: Path,
    names: list[str],
    drawn_as: dict[str, str],
    tensor: Callable[[str], Tensor],
    legacy: bool,
) -> None:
    """Write a `.bin` file in which a tied lm_head shares its memory, as published ones do."""
    made: dict[str, Tensor] = {}
    state = {}
    for name in names:
        source = drawn_as[name]
        if source not in made:
            made[source] = tensor(name)
        state[name] = made[source]
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)


@contextmanager
def stand_in(folder: Path, size: str, keep: bool = False) -> Iterator[list[Path]]:
    """Give the weight files of a float16 checkpoint as published: sharded, random; remove it later.

    Args:
        folder: Where to make it. One that is there already is used, and stays.
        size: "125m", "350m", ...
        keep: Leave what was made.
    """
    made = not (folder / "config.json").exists()
    if made:
        shard = int(9.9e9)  # 6.7b is two files then, as published
        config = OPTConfig.from_name(size)
        make_checkpoint(folder, config, "sharded", dtype=torch.float16, max_shard_bytes=shard)
    try:
        yield sorted(folder.glob("*.safetensors"))
    finally:
        if made and not keep:
            shutil.rmtree(folder)


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="125m", help="125m, 350m, 1.3b, ... (default 125m)")
    parser.add_argument("--layout", choices=LAYOUTS, default="safetensors")
    parser.add_argument("--dialect", choices=list(DIALECTS), default="model-no-head")
    parser.add_argument("--dtype", default="float32", help="float32, float16, bfloat16, float64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=float, default=2e9)
    parser.add_argument("--legacy", action="store_true", help="pickles of PyTorch before 1.6")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer files to copy")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args()
    fields = dict(entry.split("=", 1) for entry in args.set)
    changes = {name: ast.literal_eval(value) for name, value in fields.items()}
    make_checkpoint(
        args.folder,
        OPTConfig.from_name(args.size, **changes),
        layout=args.layout,
        dialect=args.dialect,
        dtype=getattr(torch, args.dtype),
        seed=args.seed,
        max_shard_bytes=int(args.shard_bytes),
        legacy=args.legacy,
    )
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        if args.tokenizer and (args.tokenizer / name).is_file():
            shutil.copy(args.tokenizer / name, args.folder / name)


if __name__ == "__main__":
    main()
