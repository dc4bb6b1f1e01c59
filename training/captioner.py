"""BLIP (Li et al., 2022), fine-tuned to write the prompt (sections 4.4 and 4.10)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import weights
from files import atomic_write, write_array, write_json
from models.blip import BLIP, CONFIGS
from training.cache import Encoder, as_bytes, as_texts, cached_images
from training.inputs import Images
from training.loop import Process, Trainer, epoch_batches, learning_rate
from weights.kinds.blip import load_tokenizer, published
from weights.preprocessing import from_files
from weights.sources import read

BLIP_MINI = Path(__file__).resolve().parent.parent / "mini" / "blip-mini"
UNLABELLED = -100  # label of tokens without loss
GENERATE_AT_ONCE = 32  # images


@dataclass(frozen=True)
class CaptionerConfig:
    """Settings of a fine-tuned captioner.

    Paper: states only that BLIP was fine-tuned. Epochs and batch are those of section 4.2; learning rate,
    AdamW, weight decay of all parameters, label smoothing, prompt and beams those of BLIP's fine-tuning on
    COCO, without its random crops and flips (prompts may name positions) and without decoder dropout (not in
    the published files).
    """

    source: str = "blip-base"  # a name, a file or a folder, as for weights.load; "blip-mini"
    epochs: int = 3
    batch_size: int = 64
    lr: float = 1e-5  # peak of the cosine schedule
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    prompt: str = "a picture of "
    max_tokens: int = 77  # in training and generation, prompt included: Stable Diffusion's limit
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


def caption_tokens(model: BLIP, texts: Sequence[str], prompt: str, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Padded ids (B, N) of [DEC] prompt text [SEP], and labels (B, N): the ids of text and [SEP], UNLABELLED
    elsewhere. A text that is too long is cut before its [SEP].
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
        logits[:, :-1].flatten(0, 1),
        labels[:, 1:].flatten(),
        ignore_index=UNLABELLED,
        label_smoothing=smoothing,
    )


def new_captioner(seed: int) -> tuple[BLIP, data.Preprocessing]:
    """An untrained blip-mini and its preprocessing."""
    config = CONFIGS["blip-mini"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BLIP(config, load_tokenizer(BLIP_MINI)).eval()
    return model, data.Preprocessing(**from_files(BLIP_MINI, "hf", "blip", config.vision_image_size))


def open_captioner(source: str, device: str = "cpu") -> tuple[BLIP, data.Preprocessing, Path]:
    """The captioner, its preprocessing, and the folder of its tokenizer.

    Raises weights.WeightsError as `weights.load`.
    """
    preprocessing = data.Preprocessing(**weights.preprocessing("blip", source))
    return weights.load("blip", source, device=device), preprocessing, read("blip", source).folder


def write_captioner(model: BLIP, folder: Path, beside: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder in the published format: weights of `dtype`, sizes, and copies of the tokenizer and
    preprocessor files in `beside`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights.from_home("blip", model.state_dict(), "hf")
    tensors = {name: tensor.cpu().to(dtype).contiguous() for name, tensor in tensors.items()}
    atomic_write(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    write_json(folder / "config.json", published(model.config))
    for name in ("vocab.txt", "tokenizer.json", "preprocessor_config.json", "processor_config.json"):
        if (beside / name).is_file() and beside != folder:
            atomic_write(folder / name, (beside / name).read_bytes())


class CaptionerTrainer(Trainer):
    """Trains `model` in place to write the prompts of the rows in `splits["train"]`, on one process; bf16 on
    CUDA.

    `folder` holds last/, used to resume, and log.jsonl. `fit` raises data.DataError if `folder` belongs to
    another configuration or other pairs, and if the loss is not finite.
    """

    label = "captioner"

    def __init__(
        self,
        model: BLIP,
        preprocessing: data.Preprocessing,
        config: CaptionerConfig,
        pairs: data.Pairs,
        splits: Mapping[str, np.ndarray],
        folder: Path,
        device: str = "cpu",
    ):
        settings = dataclasses.asdict(config)
        del settings["workers"], settings["checkpoint_every"]  # they do not affect the result
        prompts = [pairs.prompts[i] for i in splits["train"]]
        identity = hashlib.sha256(json.dumps([settings, prompts]).encode()).hexdigest()
        optimizer = torch.optim.AdamW(
            model.to(device).parameters(),
            lr=config.lr,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=config.weight_decay,
        )
        names = [name for name, _ in model.named_parameters()]
        super().__init__(folder, model, optimizer, names, identity, Process(device=device))
        self.preprocessing, self.config, self.pairs, self.splits = preprocessing, config, pairs, splits
        self.steps_per_epoch = math.ceil(len(splits["train"]) / config.batch_size)
        self.total = self.steps_per_epoch * config.epochs
        self.checkpoint_every = config.checkpoint_every

    def batches(self, epoch: int, first: int) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor]]]:
        rows, config = self.splits["train"], self.config
        order = epoch_batches(len(rows), config.batch_size, config.seed, epoch)[first:]
        for batch in self.tensors([rows[chosen] for chosen in order]):
            yield len(batch[0]), batch

    def tensors(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images, token ids and labels for each batch of rows."""
        config, device = self.config, self.process.device
        max_tokens = min(config.max_tokens, self.model.config.text_max_position_embeddings)
        loader = DataLoader(
            Images(self.pairs, self.preprocessing),
            batch_sampler=batches,
            num_workers=config.workers,
            generator=torch.Generator(),
        )
        for rows, images in zip(batches, loader, strict=True):
            texts = [self.pairs.prompts[i] for i in rows]
            ids, labels = caption_tokens(self.model, texts, config.prompt, max_tokens)
            yield images.to(device), ids.to(device), labels.to(device)

    def rate(self) -> float:
        return learning_rate(self.config.lr, self.step, self.total)

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        images, ids, labels = batch
        device = self.process.device.split(":")[0]
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = self.model(images, ids)
        return {"loss": caption_loss(logits.float(), labels, self.config.label_smoothing)}

    def fit(self) -> None:
        super().fit()
        self.model.eval()

    @torch.no_grad()
    def validate(self, epoch: int) -> dict[str, float]:
        """The mean validation loss, logged only."""
        rows = self.splits["val"]
        batches = np.array_split(rows, math.ceil(len(rows) / self.config.batch_size))
        losses = [self.loss(batch)["loss"].item() for batch in self.tensors(batches)]
        return {"val_loss": float(np.mean(losses))}


def written_prompts(
    model: BLIP,
    preprocessing: data.Preprocessing,
    config: CaptionerConfig,
    pairs: data.Pairs,
    device: str = "cpu",
) -> list[str]:
    """The captioner's text for each image; "" if unreadable. Cached and resumable."""
    max_length = min(config.max_tokens, model.config.text_max_position_embeddings)
    settings = {
        "prompt": config.prompt,
        "num_beams": config.num_beams,
        "min_length": config.min_length,
        "max_length": max_length,
    }
    digest = hashlib.sha256(model.tokenizer.to_str().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())

    def write(images: Tensor) -> list[str]:
        return model.generate(images.to(device), **settings)

    key = {"model": digest.hexdigest(), "generate": settings}
    encoder = as_bytes(Encoder("made-captions", key, (), None, GENERATE_AT_ONCE, write))
    return as_texts(cached_images(weights.cache_dir(), pairs, preprocessing, encoder, config.workers)[0])


def blip_regressor(
    folder: Path,
    config: CaptionerConfig,
    pairs: data.Pairs,
    splits: Mapping[str, np.ndarray],
    device: str = "cpu",
    predict: Sequence[str] = ("val", "test"),
) -> dict[str, np.ndarray]:
    """Unit rows (n, 384) float32 of each split: BLIP as a regressor (table 11). It is fine-tuned on the
    training pairs and writes a prompt for each image, whose sentence embedding is the prediction.

    `splits` holds rows of `pairs`: "train", "val" and those to `predict`. `folder` then holds config.json,
    log.jsonl, blip/ (the captioner in the published format, usable by `train.py --captions`),
    predictions/<split>.npy and predictions/prompts.json. A stopped call resumes. Raises data.DataError and
    weights.WeightsError, in one line.
    """
    model, preprocessing, beside = open_captioner(config.source, device)
    CaptionerTrainer(model, preprocessing, config, pairs, splits, folder, device).fit()
    write_json(folder / "config.json", dataclasses.asdict(config))
    write_captioner(model, folder / "blip", beside)
    minilm = weights.load("minilm", device=device)
    predictions, prompts = {}, {}
    for split in predict:
        chosen = pairs.subset(splits[split])
        prompts[split] = written_prompts(model, preprocessing, config, chosen, device)
        predictions[split] = minilm.encode(prompts[split], progress=tqdm).numpy()
        write_array(folder / "predictions" / f"{split}.npy", predictions[split])
    write_json(folder / "predictions" / "prompts.json", prompts)
    return predictions
