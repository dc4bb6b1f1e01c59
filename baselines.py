"""What the paper compares its method with: LeRaC and CBS (section 4.8), k-NN and BLIP (section 4.10).

LeRaC and CBS are the other curricula: `python train.py --curriculum lerac` or `cbs`. Letters in shape
comments as in reverse_sd.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import weights
from models.blip import BLIP, CONFIGS
from models.swin import PatchMerging
from weights.kinds.blip import load_tokenizer, published
from weights.preprocessing import from_files
from weights.sources import read

log = logging.getLogger("baselines")

# ============================================================================================================
# Section 4.8: LeRaC, Learning Rate Curriculum (Croitoru et al., 2024)
# ============================================================================================================


def lerac_initial(highest: float, lowest: float, layers: int) -> list[float]:
    """The learning rates at step 0 from input to output: `highest`, ..., `lowest`, in equal ratios.

    Paper: the range is not stated, it was tuned. LeRaC's own begins at the normal rate and reaches down to
    1e-8.
    """
    if layers < 2:
        return [highest] * layers
    return [highest * (lowest / highest) ** (j / (layers - 1)) for j in range(layers)]


def lerac_rate(initial: float, final: float, t: float, k: float, c: float = 10.0) -> float:
    """eta_j(t) = eta_j(0) c^{(t/k)(log_c eta(k) - log_c eta_j(0))}, the rate of a layer at step t of k.

    initial eta_j(0); final eta(k), the same for all layers. From t = k on the rate is `final`: the caller
    goes on with its own schedule. The base c cancels out: it is a straight line in the logarithm whatever c.
    """
    if t >= k:
        return final
    return initial * c ** (t / k * (math.log(final, c) - math.log(initial, c)))


# ============================================================================================================
# Section 4.8: CBS, Curriculum by Smoothing (Sinha et al., 2020)
# ============================================================================================================


def cbs_sigma(step: int, every: float) -> float:
    """1 at first, times 0.9 after each `every` steps."""
    return 0.9 ** int(step / every)


def gaussian(sigma: float) -> Tensor:
    """A 3 x 3 Gaussian of standard deviation `sigma` pixels, of sum 1."""
    line = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) ** 2) / (2 * sigma**2))
    kernel = line[:, None] * line
    return (kernel / kernel.sum()).float()


def smoothed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers after which CBS smooths, by name: convolutions wider than one pixel, and Swin's patch
    merging, which is such a convolution written as a linear layer.

    U-Net: the first convolution, both of each ResBlock, and those that halve the grid. ViT, CLIP: the patch
    embedding. Swin: patch embedding and each merging. Paper: where smoothing sits in a transformer is not
    stated; here it is wherever pixels or patches are convolved, before what is norm or sum of the result.
    """
    places = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            places[name] = module
        elif isinstance(module, PatchMerging):
            places[f"{name}.reduction"] = module.reduction
    return places


class Smoothing:
    """A fixed depthwise 3 x 3 Gaussian after each of `smoothed_layers`, from now on.

    It is no part of the state_dict: set `sigma` again where the model is built again. Borders are padded with
    zeros, as the convolutions' own. Raises ValueError for a model without such a layer.
    """

    def __init__(self, model: nn.Module, sigma: float = 1.0):
        places = smoothed_layers(model)
        if not places:
            raise ValueError("no convolution to smooth after")
        self.sigma = sigma
        for layer in places.values():
            layer.register_forward_hook(self._smooth)

    @property
    def sigma(self) -> float:
        return self._sigma

    @sigma.setter
    def sigma(self, sigma: float) -> None:
        self._sigma, self.kernel = sigma, gaussian(sigma)

    def _smooth(self, layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        channels_last = isinstance(layer, nn.Linear)
        x = output.permute(0, 3, 1, 2) if channels_last else output      # (B, C, h, w)
        kernel = self.kernel.to(x).expand(x.shape[1], 1, 3, 3)
        x = F.conv2d(x, kernel, padding=1, groups=x.shape[1])
        return x.permute(0, 2, 3, 1) if channels_last else x


# ============================================================================================================
# Section 4.10: k-NN regression on CLIP's features
# ============================================================================================================

# Paper: neither k nor how the weights follow from the distance is stated; both are chosen on validation.
NEIGHBOURS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
TEMPERATURES = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def neighbours(
    query: np.ndarray, reference: np.ndarray, k: int, device: str = "cpu", block: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of `reference` (m, P) with the largest cosine to each row of `query` (n, P).

    -> cosines (n, k) float32, largest first, and rows (n, k) int64; equal cosines in the order of the rows.
    `block` queries at a time (None: as many as give 2^25 cosines). Raises ValueError unless 1 <= k <= m.
    """
    m = len(reference)
    if not 1 <= k <= m:
        raise ValueError(f"k = {k}: there are {m} rows to choose from")
    block = block or max(1, 2**25 // m)
    texts = F.normalize(torch.as_tensor(np.asarray(reference, np.float32), device=device), dim=1)
    cosines, rows = [], []
    for start in range(0, len(query), block):
        part = torch.as_tensor(np.asarray(query[start : start + block], np.float32), device=device)
        near = F.normalize(part, dim=1) @ texts.T                                      # (b, m)
        least = near.topk(k).values[:, -1:]
        above, equal = near > least, near == least
        room = k - above.sum(dim=1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))    # k in each row
        row = chosen.nonzero()[:, 1].reshape(-1, k)                                    # in ascending order
        cosine, order = near.gather(1, row).sort(dim=1, descending=True, stable=True)
        cosines.append(cosine.cpu().numpy())
        rows.append(row.gather(1, order).cpu().numpy())
    return np.concatenate(cosines), np.concatenate(rows)


def neighbour_mean(
    cosines: np.ndarray, rows: np.ndarray, targets: np.ndarray, temperatures: Sequence[float]
) -> np.ndarray:
    """Mean of the neighbours' targets, weighted by exp(cosine / temperature), as unit rows, one for each
    temperature: (n, T, E) float32. cosines, rows (n, k) as `neighbours` gives them; targets (m, E).
    """
    means = np.empty((len(rows), len(temperatures), targets.shape[1]), np.float32)
    for start in range(0, len(rows), 64):
        part = slice(start, start + 64)
        below = (cosines[part] - cosines[part, :1])[:, None]                           # (b, 1, k)
        weight = np.exp(below / np.asarray(temperatures, np.float32)[:, None])         # (b, T, k)
        means[part] = weight @ targets[rows[part]]                                     # (b, T, E)
    return means / np.linalg.norm(means, axis=2, keepdims=True)


def knn_regression(
    query: np.ndarray, reference: np.ndarray, targets: np.ndarray, k: int, temperature: float,
    device: str = "cpu", block: int | None = None,
) -> np.ndarray:
    """Prompt embeddings regressed from neighbours in CLIP's space (section 4.10) -> unit rows (n, E) float32.

    query      CLIP's embeddings of the images to predict, (n, P)
    reference  of training pairs, (m, P): CLIP's embeddings of their prompts, as in the paper, or of their
               images, which also works for an image tower without its text tower
    targets    sentence embeddings of the training prompts, (m, E)
    """
    return neighbour_mean(*neighbours(query, reference, k, device, block), targets, [temperature])[:, 0]


def choose_neighbours(
    query: np.ndarray, truth: np.ndarray, reference: np.ndarray, targets: np.ndarray, device: str = "cpu"
) -> dict[str, float]:
    """k of NEIGHBOURS and temperature of TEMPERATURES with the highest mean cosine to `truth` (n, E).

    Give validation pairs as query and truth -> {"k", "temperature", "cosine"}.
    """
    ks = [k for k in NEIGHBOURS if k <= len(reference)]
    cosines, rows = neighbours(query, reference, ks[-1], device)
    scores = np.zeros((len(ks), len(TEMPERATURES)))
    for start in range(0, len(query), 1024):
        part = slice(start, start + 1024)
        for i, k in enumerate(ks):
            means = neighbour_mean(cosines[part, :k], rows[part, :k], targets, TEMPERATURES)
            scores[i] += np.einsum("nte,ne->t", means, truth[part]) / len(query)
    i, j = np.unravel_index(scores.argmax(), scores.shape)
    return {"k": ks[i], "temperature": TEMPERATURES[j], "cosine": float(scores[i, j])}


# ============================================================================================================
# Sections 4.4 and 4.10: BLIP (Li et al., 2022), fine-tuned to write the prompt; its embedding is the answer
# ============================================================================================================

BLIP_MINI = Path(__file__).resolve().parent / "mini" / "blip-mini"
UNLABELLED = -100  # a token that is not to be learnt
GENERATE_AT_ONCE = 32  # images


@dataclass(frozen=True)
class CaptionerConfig:
    """Everything that decides a fine-tuned captioner and what it writes.

    Paper: says only that BLIP was fine-tuned. Epochs and batch are those of section 4.2; the learning rate,
    AdamW, its weight decay of all parameters, label smoothing, prompt and beams those with which BLIP itself
    was fine-tuned on COCO. Not its random crops and flips, since a prompt may say where things are, and not
    its decoder's dropout, which the published files do not state.
    """

    source: str = "blip-base"  # a name, a file or a folder, as for weights.load; "blip-mini"
    epochs: int = 3
    batch_size: int = 64
    lr: float = 1e-5  # peak of the cosine schedule
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    prompt: str = "a picture of "
    max_tokens: int = 77  # of training and writing, "a picture of " included: what Stable Diffusion reads
    num_beams: int = 3
    min_length: int = 5
    seed: int = 0
    checkpoint_every: int = 100  # steps
    workers: int = 0  # processes that read images


CAPTIONERS: dict[str, CaptionerConfig] = {
    "blip-base": CaptionerConfig(),
    "blip-large": CaptionerConfig("blip-large", lr=2e-6),
    "blip-mini": CaptionerConfig("blip-mini", epochs=6, batch_size=32, lr=1e-3),
}


def caption_tokens(
    model: BLIP, texts: Sequence[str], prompt: str, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Texts -> ids (B, N) of [DEC] prompt text [SEP], filled up, and labels (B, N): the ids of text and
    [SEP], UNLABELLED elsewhere. A text that is too long is cut before its [SEP].
    """
    config, encode = model.config, model.tokenizer.encode_batch
    before = 1 + len(model.tokenizer.encode(prompt, add_special_tokens=False).ids)
    lines = [e.ids[: max_tokens - 2] for e in encode([prompt + t for t in texts], add_special_tokens=False)]
    ids = torch.full((len(lines), 2 + max(map(len, lines))), config.text_pad_token_id)
    labels = torch.full_like(ids, UNLABELLED)
    for row, label, line in zip(ids, labels, lines, strict=True):
        whole = torch.tensor([config.text_bos_token_id, *line, config.text_sep_token_id])
        row[: len(whole)] = whole
        label[before : len(whole)] = whole[before:]
    return ids, labels


def caption_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.1) -> Tensor:
    """BLIP's language modelling loss: the mean cross-entropy of each labelled token given the image and all
    tokens before it. logits (B, N, V), labels (B, N). Source: Li et al. 2022, section 3.2.
    """
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=UNLABELLED,
        label_smoothing=smoothing,
    )


def new_captioner(seed: int) -> tuple[BLIP, data.Preprocessing]:
    """blip-mini with random values, and how it reads pictures."""
    config = CONFIGS["blip-mini"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BLIP(config, load_tokenizer(BLIP_MINI)).eval()
    return model, data.Preprocessing(**from_files(BLIP_MINI, "hf", "blip", config.vision_image_size))


def open_captioner(source: str, device: str = "cpu") -> tuple[BLIP, data.Preprocessing, Path]:
    """The captioner, how it reads pictures, and the folder of its tokenizer.

    Raises weights.WeightsError as `weights.load`.
    """
    how = data.Preprocessing(**weights.preprocessing("blip", source))
    return weights.load("blip", source, device=device), how, read("blip", source).folder


def write_captioner(model: BLIP, folder: Path, beside: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder as published: weights of `dtype`, sizes, and what the folder `beside` says of words and
    pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights.from_home("blip", model.state_dict(), "hf")
    tensors = {name: tensor.cpu().to(dtype).contiguous() for name, tensor in tensors.items()}
    data.atomic_write(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    data.atomic_write(folder / "config.json", json.dumps(published(model.config), indent=1) + "\n")
    for name in ("vocab.txt", "tokenizer.json", "preprocessor_config.json", "processor_config.json"):
        if (beside / name).is_file() and beside != folder:
            data.atomic_write(folder / name, (beside / name).read_bytes())


def finetune_captioner(
    model: BLIP, how: data.Preprocessing, config: CaptionerConfig, pairs: data.Pairs,
    splits: Mapping[str, np.ndarray], folder: Path, device: str = "cpu",
) -> None:
    """Train `model` in place to write the prompts of splits["train"], as `config` says, on one process.

    `folder` holds last/, from which the same call goes on where it was stopped, and log.jsonl; the loss on
    splits["val"] is logged after each epoch, and decides nothing. bf16 on CUDA. Raises data.DataError where
    `folder` belongs to another configuration or other pairs, and for a loss that is not finite.
    """
    from train import Checkpoint, Images, epoch_batches, learning_rate, load_optimizer, optimizer_tensors

    rows, max_tokens = splits["train"], min(config.max_tokens, model.config.text_max_position_embeddings)
    said = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("workers", "checkpoint_every")}
    identity = hashlib.sha256(json.dumps([said, [pairs.prompts[i] for i in rows]]).encode()).hexdigest()
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.AdamW(
        model.to(device).parameters(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8,
        weight_decay=config.weight_decay,
    )
    checkpoint, step = Checkpoint(folder / "last"), 0
    if (found := checkpoint.load()) is not None:
        state, tensors = found
        if state["identity"] != identity:
            raise data.DataError(f"{folder}: a captioner of other pairs or options; give another folder")
        model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
        load_optimizer(optimizer, names, tensors)
        step = state["step"]

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    data.atomic_write(path, "".join(kept))

    def batches(places: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        loader = DataLoader(
            Images(pairs, how), batch_sampler=places, num_workers=config.workers, generator=torch.Generator()
        )
        for chosen, images in zip(places, loader, strict=True):
            texts = [pairs.prompts[i] for i in chosen]
            ids, labels = caption_tokens(model, texts, config.prompt, max_tokens)
            yield images.to(device), ids.to(device), labels.to(device)

    def loss_of(images: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=device.startswith("cuda")):
            logits = model(images, ids)
        return caption_loss(logits.float(), labels, config.label_smoothing)

    steps = math.ceil(len(rows) / config.batch_size)
    total = steps * config.epochs
    model.train()
    with path.open("a") as file, tqdm(total=total, initial=step, desc="captioner", unit="step") as bar:
        for epoch in range(step // steps, config.epochs):
            order = epoch_batches(len(rows), config.batch_size, config.seed, epoch)
            places = [rows[batch] for batch in order[step - epoch * steps :]]
            started = time.perf_counter()
            for batch in batches(places):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, step, total)
                loss = loss_of(*batch)
                if not math.isfinite(loss.item()):
                    raise data.DataError(f"{folder}: the loss is not finite at step {step}; lower the lr")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                step += 1
                now = time.perf_counter()
                entry = {"step": step, "epoch": epoch, "loss": loss.item(), "lr": group["lr"],
                         "images_per_second": len(batch[0]) / (now - started)}
                started = now
                file.write(json.dumps(entry) + "\n")
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                if step % steps == 0:
                    held = np.array_split(splits["val"], math.ceil(len(splits["val"]) / config.batch_size))
                    with torch.no_grad():
                        losses = [loss_of(*batch).item() for batch in batches(held)]
                    entry = {"step": step, "epoch": epoch, "val_loss": float(np.mean(losses))}
                    file.write(json.dumps(entry) + "\n")
                if step % steps == 0 or step % config.checkpoint_every == 0:
                    file.flush()
                    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
                    tensors |= optimizer_tensors(optimizer, names)
                    checkpoint.save({"step": step, "total": total, "identity": identity}, tensors)
    model.eval()


def written_prompts(
    model: BLIP, how: data.Preprocessing, config: CaptionerConfig, pairs: data.Pairs, device: str = "cpu"
) -> list[str]:
    """What the captioner writes of each image; "" where it cannot be read. Made once, and resumable."""
    max_length = min(config.max_tokens, model.config.text_max_position_embeddings)
    settings = {"prompt": config.prompt, "num_beams": config.num_beams, "min_length": config.min_length,
                "max_length": max_length}
    digest = hashlib.sha256(model.tokenizer.to_str().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())

    def write(images: Tensor) -> list[str]:
        return model.generate(images.to(device), **settings)

    key = {"model": digest.hexdigest(), "generate": settings}
    return data.cached_captions(
        weights.cache_dir(), pairs, key, how, write, GENERATE_AT_ONCE, config.workers
    )


def blip_regressor(
    folder: Path, config: CaptionerConfig, pairs: data.Pairs, splits: Mapping[str, np.ndarray],
    device: str = "cpu", predict: Sequence[str] = ("val", "test"),
) -> dict[str, np.ndarray]:
    """BLIP as a regressor (table 11): fine-tuned on the training pairs, it writes a prompt for each image;
    the prompt's sentence embedding is the prediction.

    `splits` holds rows of `pairs`: "train", "val" and those to `predict`. -> unit rows (n, 384) float32 of
    each split, in its order. `folder` then holds config.json, log.jsonl, blip/ (the captioner as a published
    folder: also a source for `train.py --captions`), predictions/<split>.npy and predictions/prompts.json. A
    stopped call goes on where it was. Raises data.DataError and weights.WeightsError, in one line.
    """
    from train import save_array

    model, how, beside = open_captioner(config.source, device)
    finetune_captioner(model, how, config, pairs, splits, folder, device)
    data.atomic_write(folder / "config.json", json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    write_captioner(model, folder / "blip", beside)
    minilm = weights.load("minilm", device=device)
    (folder / "predictions").mkdir(exist_ok=True)
    predictions, prompts = {}, {}
    for split in predict:
        chosen = pairs.subset(splits[split])
        prompts[split] = written_prompts(model, how, config, chosen, device)
        predictions[split] = minilm.encode(prompts[split], progress=tqdm).numpy()
        save_array(folder / "predictions" / f"{split}.npy", predictions[split])
    data.atomic_write(folder / "predictions" / "prompts.json", json.dumps(prompts, indent=0) + "\n")
    return predictions
