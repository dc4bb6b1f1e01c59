"""The Vision Transformer in plain NumPy: a port, made with PORTING.md and checked by golden files.

    python -m weights golden vit golden/vit --source vit-mini
    python examples/vit_numpy.py golden/vit port/vit
    python -m weights compare golden/vit port/vit

Reads index.json, inputs and weights of the golden folder, and writes every activation under the name that the
golden ones have. The weights' names and layouts are those of models/vit.py, which are timm's.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

Arrays = dict[str, np.ndarray]
erf = np.vectorize(math.erf, otypes=[np.float64])


def linear(x: np.ndarray, weights: Arrays, name: str) -> np.ndarray:
    """(..., in) -> (..., out): a Linear's weight is stored (out, in)."""
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def layer_norm(x: np.ndarray, weights: Arrays, name: str, eps: float) -> np.ndarray:
    """Layer norm over the last axis, with the biased variance and eps inside the root."""
    centred = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    """The exact one, not the tanh approximation."""
    return x * (1 + erf(x / math.sqrt(2))).astype(x.dtype) / 2


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def patches(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(B, C, H, W) -> (B, h·w, C·p·q): a convolution whose stride is its kernel is a matrix product."""
    (batch, channels, height, width), (p, q) = images.shape, size
    grid = images[:, :, : height // p * p, : width // q * q].reshape(
        batch, channels, height // p, p, width // q, q
    )
    return grid.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * p * q)


def attention(qkv: np.ndarray, heads: int) -> np.ndarray:
    """(B, N, 3 D) -> (B, N, D); q, k and v lie one after another, and each is cut into heads."""
    batch, n, width = qkv.shape
    qkv = qkv.reshape(batch, n, 3, heads, width // 3 // heads).transpose(2, 0, 3, 1, 4)
    q, k, v = qkv                                                        # each (B, heads, N, D / heads)
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])
    return (softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(batch, n, -1)


def vit(images: np.ndarray, weights: Arrays, config: dict) -> tuple[np.ndarray, Arrays]:
    """Images (B, C, H, W) -> features (B, D), and every activation by its name."""
    eps, seen = config["norm_eps"], {}
    kernel = weights["patch_embed.proj.weight"]
    x = patches(images, config["patch_size"]) @ kernel.reshape(len(kernel), -1).T
    x = x + weights["patch_embed.proj.bias"]
    grid = [side // patch for side, patch in zip(config["img_size"], config["patch_size"], strict=True)]
    seen["patch_embed.proj"] = x.transpose(0, 2, 1).reshape(len(x), -1, *grid)   # as the convolution has it
    if config["class_token"]:
        first = np.broadcast_to(weights["cls_token"], (len(x), 1, x.shape[-1]))
        x = np.concatenate([first, x], axis=1)                           # (B, 1 + h·w, D)
    x = x + weights["pos_embed"]
    for i in range(config["depth"]):
        block = f"blocks.{i}"
        h = seen[f"{block}.norm1"] = layer_norm(x, weights, f"{block}.norm1", eps)
        h = seen[f"{block}.attn.qkv"] = linear(h, weights, f"{block}.attn.qkv")
        h = seen[f"{block}.attn.proj"] = linear(
            attention(h, config["num_heads"]), weights, f"{block}.attn.proj"
        )
        x = x + h
        h = seen[f"{block}.norm2"] = layer_norm(x, weights, f"{block}.norm2", eps)
        h = seen[f"{block}.mlp.fc1"] = linear(h, weights, f"{block}.mlp.fc1")
        h = seen[f"{block}.mlp.fc2"] = linear(gelu(h), weights, f"{block}.mlp.fc2")
        x = seen[block] = x + h
    if not config["fc_norm"]:
        x = seen["norm"] = layer_norm(x, weights, "norm", eps)
    x = x[:, 0] if config["global_pool"] == "token" else x[:, int(config["class_token"]) :].mean(axis=1)
    if config["fc_norm"]:
        x = seen["fc_norm"] = layer_norm(x, weights, "fc_norm", eps)
    return x, seen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("golden", type=Path, help="a folder of `python -m weights golden vit`")
    parser.add_argument("out", type=Path, help="where the port's activations and output go")
    args = parser.parse_args()
    index = json.loads((args.golden / "index.json").read_text())
    if index["kind"] != "vit":
        parser.error(f"{args.golden} holds a {index['kind']}, not a vit")
    images = load_file(args.golden / "inputs.safetensors")["images"]
    output, seen = vit(images, load_file(args.golden / "weights.safetensors"), index["config"])
    args.out.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(value) for name, value in seen.items()}
    save_file(contiguous, args.out / "activations.safetensors")
    save_file({"output": np.ascontiguousarray(output)}, args.out / "outputs.safetensors")
    print(f"{args.out}: {len(seen)} activations and the output")


if __name__ == "__main__":
    main()
