"""Inputs of training and evaluation: pairs, splits, targets and the backbone's cached inputs."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import data
import weights
from backbones import READERS, SDReader, as_backbone, captioner_of
from files import exclusive, records
from reverse_sd import EMBEDDING_WIDTH, Vocabulary
from schema import TEXT, checked, many
from training.cache import (
    Encoder,
    ImageRows,
    as_bytes,
    as_texts,
    cached_images,
    cached_rows,
    cached_texts,
    image_caches,
    in_batches,
    readers,
)
from training.config import TrainConfig
from training.loop import Process

log = logging.getLogger("train")

MINI_PAIRS = Path(__file__).resolve().parent.parent / "mini" / "generated"  # by mini/generated.py
# On a CPU a batch of 256 takes 1.4 times as long per sample: activations exceed the cache.
EVALUATION_BATCH = 64


class Distinct(NamedTuple):
    """The row of each distinct text (u, ...), and the row number of each pair (n,)."""

    rows: np.ndarray
    index: np.ndarray

    def __getitem__(self, i: int | np.ndarray) -> np.ndarray:
        return self.rows[self.index[i]]


class Images:
    """Each pair's picture as the backbone's input, decoded at each access."""

    def __init__(self, pairs: data.Pairs, preprocessing: data.Preprocessing):
        self.pairs, self.preprocessing = pairs, preprocessing

    def __getitem__(self, i: int) -> np.ndarray:
        return data.image_tensor(self.pairs.image(i), self.preprocessing).numpy()


@dataclass
class Prepared:
    """Inputs and targets of the cleaned pairs, by row; `splits` maps split names to rows."""

    pairs: data.Pairs
    splits: dict[str, np.ndarray]
    targets: Distinct  # (n, 384) float32, unit rows
    inputs: tuple[np.ndarray | Distinct | Images, ...]  # of the backbone's forward, see `prepare`
    preprocessing: data.Preprocessing
    fingerprint: str  # of the prompts and their split, and of --target-texts
    origin: dict[str, str] = field(default_factory=dict)  # hashes of what made the inputs: models, captions


def prepare(config: TrainConfig, device: str = "cpu") -> Prepared:
    """Pairs, cleaned and split, with their cached targets and backbone inputs.

    The inputs are, for the U-Net, latents (n, 4, h, w) and caption states (n, 77, D), both float16; for the
    black boxes the images; for a frozen backbone its features (n, width) float32. Caches are under
    weights.cache_dir() and do not depend on the heads or the seed. Pairs with an unreadable image are in no
    split.
    """
    backbone = READERS[config.backbone]
    # Read first: missing weights then stop the run before slow work. The encoders are loaded only if their
    # cache lacks rows.
    cache = cache_folder()
    with exclusive(cache, f"{cache}: another process checks or fetches weights; waiting for it"):
        kinds = (backbone.kind, *(("vae", "clip-text") if backbone.white_box else ()))
        weights.require_fed(config.weights, *kinds)
        if backbone.white_box and (captioner := captioner_of(config.captions)):
            weights.require_fed(captioner, "blip")
        weights.require_fed(None, "minilm")
    preprocessing = preprocessing_of(config)
    path = pairs_folder(config.data)
    _, pairs, splits = split_pairs(config, path)
    texts = read_target_texts(Path(config.target_texts), pairs.prompts) if config.target_texts else None
    targets = prompt_targets(pairs.prompts, device)
    inputs_of = unet_inputs if backbone.white_box else image_inputs
    inputs, readable, origin = inputs_of(config, pairs, preprocessing, device)
    splits = {name: rows[readable[rows]] for name, rows in splits.items()}
    for name, rows in splits.items():
        if not len(rows):
            raise data.DataError(f"{path}: no readable image is left for {name}; give more pairs")
    log.info("pairs: %s", ", ".join(f"{len(rows):,} {name}" for name, rows in splits.items()))
    digest = hashlib.sha256("\n".join(pairs.prompts).encode())
    for rows in splits.values():
        digest.update(rows.tobytes())
    if texts:
        targets = with_rows(targets, splits["train"], mean_targets(texts, device))
        digest.update("\n".join(texts).encode())
    return Prepared(pairs, splits, targets, inputs, preprocessing, digest.hexdigest(), origin)


def split_pairs(config: TrainConfig, path: Path) -> tuple[int, data.Pairs, dict[str, np.ndarray]]:
    """(number of pairs read, the cleaned pairs, rows of each split). Raises DataError as `read_pairs`."""
    found = data.read_pairs(path)
    pairs = found.subset(cleaned(found.prompts, config.clean))
    pictures = data.same_pictures(pairs)
    splits = data.split(pairs.prompts, config.seed, config.val_size, config.test_size, pictures)
    return len(found), pairs, splits


def cache_folder() -> Path:
    """The folder of all caches, created here. Raises data.DataError if it cannot be."""
    folder = weights.cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise data.DataError(
            f"{folder}: cannot be created ({error.strerror or error}); set REVERSE_SD_CACHE to a writable "
            "folder"
        ) from error
    return folder


def pairs_folder(name: str) -> Path:
    """The folder of --data; drawn scenes are built into the cache if missing."""
    if name == "mini":
        return MINI_PAIRS
    if name != "drawn":
        return Path(name)
    from mini import scenes

    path = cache_folder() / f"mini-scenes-{scenes.VERSION}"
    path.mkdir(exist_ok=True)
    with exclusive(path, f"{path}: another process draws the scenes; waiting for it"):
        scenes.build(path)
    return path


def preprocessing_of(config: TrainConfig) -> data.Preprocessing:
    """The run's image preprocessing; for a black box that of its checkpoint."""
    backbone = READERS[config.backbone]
    if backbone.white_box:
        return data.Preprocessing.square(config.image_size)
    return data.Preprocessing(**weights.preprocessing(backbone.kind, config.weights))


def cleaned(prompts: list[str], rule: str) -> np.ndarray:
    """Rows kept by the cleaning rule; logs the number dropped by each rule."""
    if rule == "off":
        return np.flatnonzero([bool(prompt) for prompt in prompts])
    kept, report = data.clean(prompts, near_duplicates=rule != "duplicates")
    log.info("cleaning (section 4.1): %s", ", ".join(f"{n:,} {name}" for name, n in report.items()))
    if rule == "auto" and len(kept) < 0.1 * len(set(prompts)):
        log.warning(
            "cleaning: these prompts follow a template: the paper's rule of 50 equal characters keeps %d "
            "of %d; only equal prompts are dropped (--clean paper applies the rule anyway)",
            *(len(kept), len(prompts)),
        )
        return cleaned(prompts, "duplicates")
    return kept


# ============================================================================================================
# Caches
# ============================================================================================================


def prompt_targets(prompts: list[str], device: str) -> Distinct:
    """The sentence embedding of each prompt, (n, 384)."""
    minilm = functools.cache(lambda: weights.load("minilm", device=device))
    encoder = Encoder(
        "targets", {"model": weights.fingerprint("minilm")}, (EMBEDDING_WIDTH,), np.float32, 1024,
        lambda texts: minilm().encode(texts),
    )  # fmt: skip
    return Distinct(*cached_texts(weights.cache_dir(), prompts, encoder))


def clip_texts(source: str, prompts: list[str], device: str) -> Distinct:
    """CLIP's embedding of each prompt, (n, P) float32, not of unit length, by the whole CLIP in `source`.
    Raises weights.WeightsError if it holds no text half with projection."""
    width = weights.config("clip-text", source).projection_dim
    if width is None:
        raise weights.WeightsError(f"{source}: its text half has no projection; give a whole CLIP")
    tower = functools.cache(lambda: weights.load("clip-text", source, device=device))
    tokenizer = weights.load_tokenizer(source)

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        return tower().pooled(tokenizer(texts).to(device))

    key = {"model": weights.fingerprint("clip-text", source)}
    encoder = Encoder("clip-texts", key, (width,), np.float32, 64, encode)
    return Distinct(*cached_texts(weights.cache_dir(), prompts, encoder))


def read_target_texts(path: Path, prompts: list[str]) -> list[str]:
    """The texts of each prompt in the file of --target-texts, as a JSON list; the prompt itself, and one
    warning with the count, where the file has none. Raises DataError for a line that does not fit, and if no
    line is for one of the prompts."""
    texts, fields = {}, {"prompt": TEXT, "texts": many(TEXT, 1)}
    for number, row in records(path):
        if isinstance(row, str):
            raise data.DataError(f"{path}: line {number} {row}; correct it")
        row = checked(row, fields, f"{path}: line {number}")
        texts[row["prompt"]] = json.dumps(row["texts"])
    if missing := sum(prompt not in texts for prompt in prompts):
        if missing == len(prompts):
            raise data.DataError(
                f"{path}: no line is for one of the {missing:,} prompts; give those of --data"
            )
        log.warning(
            "%s: no texts for %d of %d prompts; they stand for themselves", path, missing, len(prompts)
        )
    return [texts.get(prompt) or json.dumps([prompt]) for prompt in prompts]


def mean_targets(texts: list[str], device: str) -> Distinct:
    """The mean embedding of each JSON list of texts, as a unit row, (n, 384)."""
    minilm = functools.cache(lambda: weights.load("minilm", device=device))

    def encode(lists: list[str]) -> Tensor:
        groups = [json.loads(each) for each in lists]
        rows = minilm().encode([text for group in groups for text in group])
        return F.normalize(torch.stack([part.mean(dim=0) for part in rows.split(list(map(len, groups)))]))

    key = {"model": weights.fingerprint("minilm")}
    encoder = Encoder("target-texts", key, (EMBEDDING_WIDTH,), np.float32, 64, encode)
    return Distinct(*cached_texts(weights.cache_dir(), texts, encoder))


def with_rows(targets: Distinct, rows: np.ndarray, others: Distinct) -> Distinct:
    """The targets, with those of `others` at these rows."""
    index = targets.index.copy()
    index[rows] = len(targets.rows) + others.index[rows]
    return Distinct(np.concatenate([targets.rows, others.rows]), index)


def unet_inputs(
    config: TrainConfig, pairs: data.Pairs, preprocessing: data.Preprocessing, device: str
) -> tuple[tuple, np.ndarray, dict[str, str]]:
    """Latents and caption states of all pairs, or the frozen U-Net's features; readable images as a mask;
    `Prepared.origin`."""
    cache, source = weights.cache_dir(), config.weights
    sd = SDReader(source, captioner_of(config.captions), device)
    vae = weights.config("vae", source)
    vae_key, text_key = weights.fingerprint("vae", source), weights.fingerprint("clip-text", source)
    autocast, (height, width) = encoder_autocast(config, device), preprocessing.size
    shape = (vae.embed_dim, height // 8, width // 8)
    latents_encoder = Encoder("latents", {"model": vae_key}, shape, np.float16, 32, sd.latents, autocast)
    encoders = [(preprocessing, latents_encoder), *captions_encoder(sd)]
    (latents, readable), *made = image_caches(cache, pairs, encoders, config.workers, device)
    captions = as_texts(made[0][0]) if made else captions_of(config, pairs)
    contexts = text_states(sd, captions, autocast)
    key = {"vae": vae_key, "text": text_key}
    key["captions"] = hashlib.sha256("\n".join(captions).encode()).hexdigest()
    # Captions that are made may differ between devices.
    origin = key | ({"captions": weights.fingerprint("blip", sd.captioner)} if sd.captioner else {})
    if config.train_blocks != 0:
        return (latents, contexts), readable, origin

    def inputs_of(rows: np.ndarray) -> list[Tensor]:
        return [torch.from_numpy(x[rows].astype(np.float32)) for x in (latents, contexts)]

    encoder = features_encoder(config, device, key | {"preprocessing": asdict(preprocessing)}, inputs_of)
    return (cached_rows(cache, pairs, encoder),), readable, origin | {"model": encoder.key["model"]}


def text_states(sd: SDReader, texts: list[str], autocast: str) -> Distinct:
    """The text tower's states of each text, (n, 77, D) float16, cached."""
    key = {"model": weights.fingerprint("clip-text", sd.source)}
    shape = (77, weights.config("clip-text", sd.source).hidden_size)
    states = Encoder("captions", key, shape, np.float16, 32, sd.states, autocast)
    contexts = Distinct(*cached_texts(weights.cache_dir(), texts, states))
    if "tokenizer" in sd.networks and (cut := sd.network("tokenizer").truncated):
        log.warning("captions: %d were cut to 75 tokens, the text tower's limit", cut)
    return contexts


def features_encoder(
    config: TrainConfig, device: str, key: dict, inputs_of: Callable[[Any], Sequence[Tensor]]
) -> Encoder:
    """The encoder of a frozen backbone's features; `inputs_of` maps a batch to the backbone's inputs."""
    kind, source = READERS[config.backbone].kind, config.weights
    backbone = functools.cache(lambda: load_backbone(config).to(device).eval())

    @torch.no_grad()
    def features(batch: Any) -> Tensor:
        return backbone()(*(tensor.to(device) for tensor in inputs_of(batch)))

    with torch.device("meta"):
        model = weights.build(kind, weights.config(kind, source))
        width = as_backbone(config.backbone, model, config.unet_features).width
    key = {"model": weights.fingerprint(kind, source)} | key
    if config.unet_features == "levels":
        key["features"] = "levels"
    return Encoder(f"{config.backbone}-features", key, (width,), np.float32, 32, features)


def captions_of(config: TrainConfig, pairs: data.Pairs) -> list[str]:
    """The captions of all pairs, by a `captions` of TrainConfig that names no captioner."""
    if config.captions == "prompt":
        log.warning("captions: true prompts; this is an upper bound, not a result")
        return pairs.prompts
    if config.captions == "empty":
        log.info("captions: none; the cross-attention gets the empty text")
        return [""] * len(pairs)
    return data.read_captions(Path(config.captions), pairs)


def captions_encoder(sd: SDReader) -> list[tuple[data.Preprocessing, Encoder]]:
    """The captioner's preprocessing and encoder; none without a captioner."""
    if sd.captioner is None:
        return []
    preprocessing = data.Preprocessing(**weights.preprocessing("blip", sd.captioner))
    key = {"model": weights.fingerprint("blip", sd.captioner), "generate": "defaults"}
    return [(preprocessing, as_bytes(Encoder("made-captions", key, (), None, 16, sd.captions)))]


def encoder_autocast(config: TrainConfig, device: str) -> str:
    """`Encoder.autocast` of latents, caption states and black boxes' features: "cuda" there, unless
    --precision is float32.

    The miniatures' rows then differ from those in float32 by at most 2 % of their norm. Others stay in
    float32: captions, of which 23 % would change; a frozen U-Net's features, which would differ by up to
    16 %, and its inputs; and the targets.
    """
    frozen_unet = READERS[config.backbone].white_box and config.train_blocks == 0
    return "cuda" if device.startswith("cuda") and config.precision != "float32" and not frozen_unet else ""


def image_inputs(
    config: TrainConfig, pairs: data.Pairs, preprocessing: data.Preprocessing, device: str
) -> tuple[tuple, np.ndarray, dict[str, str]]:
    """The images of all pairs, or the frozen backbone's features; readable images as a mask;
    `Prepared.origin`."""
    if config.train_blocks != 0:
        readable = Encoder("readable", {}, (1,), np.uint8, 256, lambda images: torch.zeros(len(images), 1))
        _, ok = cached_images(weights.cache_dir(), pairs, preprocessing, readable, config.workers, device)
        return (Images(pairs, preprocessing),), ok, {}
    encoder = features_encoder(config, device, {}, lambda images: [images])
    encoder = replace(encoder, autocast=encoder_autocast(config, device))
    features, ok = cached_images(weights.cache_dir(), pairs, preprocessing, encoder, config.workers, device)
    return (features,), ok, {"model": encoder.key["model"]}


def load_backbone(config: TrainConfig) -> nn.Module:
    """The backbone, pretrained unless --random-start: inputs -> features (B, width)."""
    kind = READERS[config.backbone].kind
    if config.random_start:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = weights.build(kind, weights.config(kind, config.weights))
    else:
        model = weights.load(kind, config.weights)
    model.checkpointing = config.activation_checkpointing
    return as_backbone(config.backbone, model, config.unet_features)


# ============================================================================================================
# Samples
# ============================================================================================================


class Samples(Dataset):
    """Rows as arrays: the backbone's inputs, target, vocabulary targets, row number."""

    def __init__(self, prepared: Prepared, rows: np.ndarray, vocabulary: Vocabulary):
        self.prepared, self.rows, self.vocabulary = prepared, rows, vocabulary

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[np.ndarray | int, ...]:
        p, row = self.prepared, int(self.rows[i])
        numbers = (x[row].astype(np.float32) for x in (*p.inputs, p.targets))
        return *numbers, self.vocabulary.targets([p.pairs.prompts[row]])[0].numpy(), row


def sample_readers(workers: int | None, prepared: Prepared, device: str) -> int:
    """Processes that read samples: by --workers for images; none for cached rows."""
    if not isinstance(images := prepared.inputs[0], Images):
        return 0
    return readers(workers, ImageRows(images.pairs, [images.preprocessing]), device)


def stacked(items: list[tuple[np.ndarray | int, ...]]) -> list[np.ndarray]:
    return [np.stack(column) for column in zip(*items, strict=True)]


def sample_batches(
    samples: Samples, batches: Iterable[Sequence[int]], workers: int
) -> Iterator[list[Tensor]]:
    """Each batch of positions as tensors; `workers` processes beside this one read the samples."""
    for arrays in in_batches(samples, batches, workers, stacked):
        yield [torch.from_numpy(array) for array in arrays]


def evaluation_batches(
    samples: Samples, process: Process, workers: int
) -> tuple[Iterator[list[Tensor]], np.ndarray]:
    """(this process's share of the batches of all samples, in order; the positions of their samples).

    The batches are the same for any number of processes, and so are the bits of what is computed from them.
    """
    starts = range(0, len(samples), EVALUATION_BATCH)
    batches = [range(start, min(start + EVALUATION_BATCH, len(samples))) for start in starts]
    batches = batches[process.rank :: process.world]
    places = np.asarray([i for batch in batches for i in batch], np.int64)
    return sample_batches(samples, batches, workers), places
