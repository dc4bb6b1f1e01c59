"""Throughput of our MiniLM beside sentence-transformers' in one run, and their largest difference.

    python benchmarks/encode.py [PROMPTS.txt] [--n 2000] [--rounds 5]

Both read the same files, the same prompts, in batches of 64, with the same number of threads; the rounds
alternate, and the ratio is the median over the rounds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer
from transformers import BertConfig

sys.path.insert(0, str(Path(__file__).parent.parent))

import weights


def sentence_transformer(folder: Path, scratch: Path) -> SentenceTransformer:
    """The oracle with the weights and tokenizer of `folder`; its other files go to `scratch`."""
    for name in ("model.safetensors", "tokenizer.json"):
        (scratch / name).symlink_to(folder / name)
    BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        layer_norm_eps=1e-12,
    ).save_pretrained(scratch)
    transformer = Transformer(str(scratch), max_seq_length=256)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    default = Path(__file__).parents[2] / "shared/data/prompts/diffusiondb_10k.txt"
    parser.add_argument("prompts", nargs="?", type=Path, default=default, help="one prompt a line")
    parser.add_argument("--n", type=int, default=2000, help="prompts to encode")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    prompts = args.prompts.read_text(encoding="utf-8").splitlines()[: args.n]

    ours = weights.load("minilm")
    scratch = tempfile.TemporaryDirectory()
    theirs = sentence_transformer(weights.resolve("minilm"), Path(scratch.name))

    def seconds(encode) -> tuple[float, torch.Tensor]:
        started = time.perf_counter()
        result = torch.as_tensor(encode())
        return time.perf_counter() - started, result

    pairs = []
    for round_ in range(args.rounds + 1):
        a, x = seconds(lambda: ours.encode(prompts, batch_size=64))
        b, y = seconds(lambda: theirs.encode(prompts, batch_size=64, show_progress_bar=False))
        if round_:  # the first warms up
            pairs.append((a, b))
    n = len(prompts)
    print(f"threads {torch.get_num_threads()}, {n:,} prompts, {args.rounds} rounds")
    for name, times in (("ours", [a for a, _ in pairs]), ("sentence-transformers", [b for _, b in pairs])):
        rates = sorted(n / t for t in times)
        print(f"{name:22s} {statistics.median(rates):7.1f} prompts/s  ({rates[0]:.1f} to {rates[-1]:.1f})")
    print(f"ratio ours / theirs    {statistics.median(b / a for a, b in pairs):7.2f}")
    print(f"largest difference     {(x - y).abs().max():.1e}")


if __name__ == "__main__":
    main()
