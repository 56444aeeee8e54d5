"""The command `optlens convert SRC DST`: any readable checkpoint as sharded safetensors."""

import argparse
import sys

from optlens.checkpoints import convert as make_conversion


def convert(options: argparse.Namespace) -> int:
    """Convert a checkpoint; print what was made, and the checksum of each file."""
    try:
        made = make_conversion(
            options.src,
            options.dst,
            dtype=options.dtype,
            shard_size=options.shard_size,
            restart=options.restart,
            revision=options.revision,
            progress=sys.stderr.isatty(),
        )
    except KeyboardInterrupt:
        print("optlens: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(made)
    for file, digest in made.checksums.items():
        print(f"{digest}  {file}")
    return 0
