"""A decoder that writes a prompt from its sentence embedding alone.

Paper: section 3 argues, after Morris et al. 2023, that embeddings can be converted back into the text. This
is the simplest such decoder: BLIP's text decoder, to which one projected embedding stands in for the image's
states. It is trained on prompts without images.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import weights
from models.blip import BLIP
from reverse_sd import EMBEDDING_WIDTH
from training.captioner import Captioner, trimmed
from training.inputs import Distinct
from training.loop import Process, Trainer, epoch_batches, learning_rate

AT_ONCE = 256  # embeddings, in generation


@dataclass(frozen=True)
class DecoderConfig:
    """Settings of a decoder. `source`: the BLIP whose sizes and tokenizer it has, and with `pretrained` its
    first text weights."""

    source: str = "blip-mini"
    pretrained: bool = False
    epochs: int = 8
    batch_size: int = 64
    lr: float = 1e-3  # peak of the cosine schedule
    weight_decay: float = 0.05
    seed: int = 0


class PromptDecoder(BLIP):
    """A BLIP whose images are unit sentence embeddings (B, E): each becomes one state."""

    def __init__(self, source: BLIP):
        super().__init__(source.config, source.tokenizer)
        del self.vision_model
        self.projection = nn.Linear(EMBEDDING_WIDTH, self.config.vision_hidden_size)

    def encode_image(self, images: Tensor) -> Tensor:
        """Unit embeddings (B, E) -> states (B, 1, D)."""
        return self.projection(images * math.sqrt(EMBEDDING_WIDTH))[:, None]  # components of variance 1


def new_decoder(config: DecoderConfig) -> Captioner:
    """The decoder before training, as a captioner of embeddings."""
    source = weights.load("blip", config.source)
    torch.manual_seed(config.seed)
    model = PromptDecoder(source)
    if config.pretrained:
        model.text_decoder.load_state_dict(source.text_decoder.state_dict())
    return Captioner("blip", model)


class DecoderTrainer(Trainer):
    """Trains a decoder on texts and their embeddings `targets` (n, E), unit rows.

    `folder` holds last/, from which a finished training is read, and log.jsonl. `fit` raises data.DataError
    if `folder` belongs to other texts or settings.
    """

    label = "decoder"
    clip_norm = 1.0

    def __init__(
        self,
        config: DecoderConfig,
        folder: Path,
        texts: Sequence[str],
        targets: np.ndarray | Distinct,
        device: str = "cpu",
    ):
        model = new_decoder(config).to(device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay
        )
        identity = hashlib.sha256(json.dumps([asdict(config), list(texts)]).encode()).hexdigest()
        names = [name for name, _ in model.named_parameters()]
        super().__init__(folder, model, optimizer, names, identity, Process(device=device))
        self.config, self.targets, self.ids = config, targets, model.tokens(texts)
        self.steps_per_epoch = math.ceil(len(texts) / config.batch_size)
        self.total = self.steps_per_epoch * config.epochs
        self.checkpoint_every = self.steps_per_epoch

    def batches(self, epoch: int, first: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        order = epoch_batches(len(self.ids), self.config.batch_size, self.config.seed, epoch)
        for rows in order[first:]:
            embeddings = torch.from_numpy(np.array(self.targets[rows]))
            ids = trimmed(self.ids[rows], self.model.pad)
            yield len(rows), (embeddings.to(self.process.device), ids.to(self.process.device))

    def rate(self) -> float:
        return learning_rate(self.config.lr, self.step, self.total)

    def loss(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The mean over all tokens of the batch, as BLIP's."""
        losses, _ = self.model(*batch)
        counts = self.model.counts(batch[1])
        return {"loss": (losses * counts).sum() / counts.sum()}

    def fit(self) -> None:
        super().fit()
        self.model.eval()


def decoded(decoder: Captioner, embeddings: np.ndarray) -> list[str]:
    """The text of each unit embedding (n, E), by BLIP's beam search."""
    device = next(decoder.parameters()).device
    parts = torch.from_numpy(np.array(embeddings, np.float32)).split(AT_ONCE)
    return [text for part in parts for text in decoder.captions(part.to(device))]
