"""Logits, hidden states and greedy tokens beside transformers', as a Markdown table.

Without arguments: a small random checkpoint of each family. Folders or hub ids may be
named instead. Exits with 1 where float32 is further apart than its tolerance.

    python experiments/parity/compare.py [MODEL ...] [--dtype bfloat16] [--layers]
"""

import argparse
import importlib.metadata
import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

DTYPES = ("float32", "bfloat16")
PEERS = ("torch", "transformers")
HEADER = (
    "model",
    "dtype",
    "logits, max",
    "logits, mean",
    "hidden states, max",
    "left-padded logits, max",
    "equal greedy ids",
    "rounding error / transformers'",
)


def main(arguments: Sequence[str]) -> int:
    """Prints the table; returns the exit code."""
    options = parse(arguments)
    if missing := [name for name in PEERS if importlib.util.find_spec(name) is None]:
        print(
            f"{' and '.join(missing)} missing: pip install 'relax-lm[experiments]'",
            file=sys.stderr,
        )
        return 2
    from measure import TOLERANCE, measure
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    versions = (f"{n} {importlib.metadata.version(n)}" for n in (*PEERS, "jax"))
    print(
        f"{', '.join(versions)}; {options.tokens} tokens, {options.new_tokens} greedy; "
        f"float32 must be within {TOLERANCE}\n"
    )
    print(row(HEADER), row(["---"] * len(HEADER)), sep="\n")
    layers, excesses = [], []
    for name, dtype, folder in checkpoints(options):
        parity = measure(folder, dtype, options.tokens, options.new_tokens)
        print(row([name, *cells(parity)]), flush=True)
        errors = " ".join(f"{error:.1e}" for error in parity.hidden)
        layers.append(f"- {name}, {dtype}: {errors}")
        excesses += [f"{name}: {excess}" for excess in parity.excesses()]
    if options.layers:
        print("\nHidden states before each layer, and after the final norm:\n")
        print(*layers, sep="\n")
    for excess in excesses:
        print(excess, file=sys.stderr)
    return 1 if excesses else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folder or hub id")
    parser.add_argument("--dtype", choices=DTYPES, help="one of the two (both)")
    parser.add_argument("--tokens", type=int, default=64, help="of a text (64)")
    parser.add_argument("--new-tokens", type=int, default=64, help="greedy (64)")
    parser.add_argument("--layers", action="store_true", help="errors of each layer")
    return parser.parse_args(arguments)


def checkpoints(options: argparse.Namespace) -> Iterator[tuple[str, str, Path]]:
    """Yields name, dtype and folder of what is to be compared.

    Raises FileNotFoundError for a name that is no released checkpoint.
    """
    from families import FAMILIES, write_checkpoint

    from relax.checkpoints.pretrained import find_pretrained

    dtypes = DTYPES if options.dtype is None else (options.dtype,)
    for name in options.models:
        folder = find_pretrained(name)
        if folder is None:
            raise FileNotFoundError(f"{name} is no folder of a released checkpoint")
        for dtype in dtypes:
            yield name, dtype, folder
    for family in () if options.models else FAMILIES:
        for dtype in dtypes:
            with tempfile.TemporaryDirectory() as folder:
                write_checkpoint(Path(folder), family, dtype)
                yield family, dtype, Path(folder)


def cells(parity) -> list[str]:
    """Returns a row's text after its name."""
    worst = max(range(len(parity.hidden)), key=parity.hidden.__getitem__)
    ratio, gap = parity.rounding_ratio, parity.gap
    greedy = f"{parity.agreed}/{parity.new_tokens}"
    return [
        parity.dtype,
        f"{parity.logits:.1e}",
        f"{parity.mean_logits:.1e}",
        f"{parity.hidden[worst]:.1e} ({worst})",
        f"{parity.padded_logits:.1e}",
        greedy if gap is None else f"{greedy} (gap {gap:.1e})",
        "" if ratio is None else f"{ratio:.2f}",
    ]


def row(texts: Sequence[str]) -> str:
    """Returns one line of a Markdown table."""
    return f"| {' | '.join(texts)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
