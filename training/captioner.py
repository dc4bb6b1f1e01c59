"""Captioners that write the prompt (section 4.4), BLIP (Li et al., 2022) and BLIP-2 (2023), with a vocabulary
head; loaded, also from a run of train.py, and written.

Paper: the placement of the vocabulary head on a captioner is not stated. Here it is one linear layer on
states of the image alone, head (1) of figure 3: a state that has read the prompt would give its words away.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

import data
import weights
from backbones import CAPTIONERS
from files import atomic_write, write_json
from models.blip import BLIP, CONFIGS
from weights.kinds.blip import load_tokenizer, published
from weights.preprocessing import from_files
from weights.sources import read

BLIP_MINI = Path(__file__).resolve().parent.parent / "mini" / "blip-mini"
MAX_TOKENS = 77  # of a text, its prompt and end mark included, in training and generation: Stable Diffusion's


@dataclass(frozen=True)
class Original:
    """A captioner's training and generation in its authors' code.

    prompt           before each text, not learnt
    end              the field of the configuration with the end mark's id
    label_smoothing  of the loss in training
    frozen           regex of the parameters that do not train; "" = none
    states           the method from images to the states that the text reads
    pooled, width    these states -> (B, D) for the vocabulary head, and the field with D
    generate         the most tokens of a text -> settings of `generate`
    """

    prompt: str
    end: str
    label_smoothing: float
    frozen: str
    states: str
    pooled: Callable[[Tensor], Tensor]
    width: str
    generate: Callable[[int], dict[str, Any]]

    def trains(self, name: str) -> bool:
        """Whether a parameter of the model trains."""
        return not (self.frozen and re.match(self.frozen, name))


ORIGINALS = {
    # salesforce/BLIP, train_caption.py and models/blip.py. The class state after the last norm is pooled.
    "blip": Original(
        "a picture of ", "text_sep_token_id", 0.1, "", "encode_image", lambda states: states[:, 0],
        "vision_hidden_size", lambda n: {"num_beams": 3, "min_length": 5, "max_length": n},
    ),
    # LAVIS, blip2_opt.py and caption_coco_ft.yaml, with the image half frozen as in pretraining. Without its
    # dropout of .1 in the Q-Former, its cleaning of texts, which removes weights such as (word:1.2), and its
    # limit of 32 tokens, which cuts the end mark of longer texts: a model so trained never stops.
    "blip2": Original(
        "", "text_eos_token_id", 0.0, r"(vision_model|language_model)\.", "encode_queries",
        lambda states: states.mean(dim=1), "qformer_hidden_size",
        lambda n: {"num_beams": 5, "min_new_tokens": 1, "max_new_tokens": n - 1},
    ),
}  # fmt: skip


class Captioner(nn.Module):
    """A BLIP or BLIP-2 in `model`, its frozen parts without gradients, and with `n_words` a vocabulary head,
    which no caption depends on. `kind`: a name of CAPTIONERS."""

    def __init__(self, kind: str, model: nn.Module, n_words: int = 0):
        super().__init__()
        self.kind, self.original, self.model = kind, ORIGINALS[kind], model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.original.trains(name))
        self.vocabulary = nn.Linear(getattr(model.config, self.original.width), n_words) if n_words else None
        places = model.config.text_max_position_embeddings - getattr(model.config, "num_query_tokens", 0)
        self.max_tokens, self.pad = min(MAX_TOKENS, places), model.config.text_pad_token_id

    @functools.cached_property
    def n_prompt(self) -> int:
        """The number of tokens before the text, its first one included."""
        prompt = self.model.tokenizer.encode(self.original.prompt, add_special_tokens=False).ids
        return 1 + len(prompt) if prompt else 0

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images and texts (B, N) -> the mean cross-entropy of each text's tokens (B,), with the original's
        label smoothing in training mode, and the vocabulary's logits (B, V), or None."""
        states = getattr(self.model, self.original.states)(images)
        smoothing = self.original.label_smoothing * self.training
        losses = self.model.loss(images, ids, self.n_prompt, smoothing, states)
        return losses, None if self.vocabulary is None else self.vocabulary(self.original.pooled(states))

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Padded ids (B, N): first token, prompt, text, end mark. A text that is too long is cut before its
        end mark; a line break in it, BLIP-2's end mark, becomes a space."""
        config, prompt = self.model.config, self.original.prompt
        lines = [prompt + text.replace("\n", " ") for text in texts]
        end, encode = getattr(config, self.original.end), self.model.tokenizer.encode_batch
        rows = []
        for start in range(0, len(lines), 4096):  # an encoding takes a hundred times the room of its ids
            for encoding in encode(lines[start : start + 4096], add_special_tokens=False):
                ids = [config.text_bos_token_id, *encoding.ids[: self.max_tokens - 2], end]
                rows.append(torch.tensor(ids))
        return nn.utils.rnn.pad_sequence(rows, True, self.pad)

    def counts(self, ids: Tensor) -> Tensor:
        """The number of tokens (B,) of the texts (B, N) that the loss counts."""
        return (ids != self.pad).sum(dim=1) - self.n_prompt

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `generate`."""
        return {"prompt": self.original.prompt} | self.original.generate(self.max_tokens)

    def captions(self, images: Tensor, **changes: Any) -> list[str]:
        """Captions of images (B, 3, H, W); `changes` of `settings`."""
        return self.model.generate(images, **self.settings | changes)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """The probability of each word (B, V) for images (B, 3, H, W); there must be a vocabulary head."""
        states = getattr(self.model, self.original.states)(images)
        return self.vocabulary(self.original.pooled(states)).float().sigmoid()

    def trained(self) -> dict[str, Tensor]:
        """The tensors that training changes, by name."""
        tensors = self.state_dict().items()
        return {name: x for name, x in tensors if self.original.trains(name.removeprefix("model."))}


def load_model(kind: str, source: str, bf16: bool) -> nn.Module:
    """The captioner of a source; with `bf16` its frozen parts have this type, and the others float32.

    Raises weights.WeightsError as `weights.load`.
    """
    dtype = torch.bfloat16 if bf16 and ORIGINALS[kind].frozen else torch.float32
    return weights.load(kind, source, dtype=dtype)


def trained_model(folder: Path, config: dict[str, Any], n_words: int = 0, device: str = "cpu") -> Captioner:
    """The captioner of a run with the weights that were best on validation, in eval mode; with 0 `n_words`
    without its vocabulary head. `config`: the run's, by training.config.read_run.

    Raises weights.WeightsError if the run is not a captioner's, and if the source of its weights has other
    sizes than when it was trained.
    """
    kind, source = config["backbone"], config["weights"]
    if kind not in CAPTIONERS:
        raise weights.WeightsError(f"{folder}: not a captioner's run, its --backbone is {kind}; give another")
    if dataclasses.asdict(weights.config(kind, source)) != config["model"]:
        raise weights.WeightsError(
            f"{folder}: {source} had other sizes when this run was trained; train it again"
        )
    bf16 = device.startswith("cuda") and config["precision"] != "float32"
    captioner = Captioner(kind, load_model(kind, source, bf16), n_words)
    path = folder / "model.safetensors"
    whole, trained = captioner.state_dict(), captioner.trained()
    tensors = {name: value for name, value in whole.items() if name not in trained}
    tensors |= weights.read_tensors(path)
    ignore = {r"vocabulary\..*": "the head is not wanted"} if config["heads"] and not n_words else {}
    weights.load_strict(captioner, tensors, ignore=ignore, source=str(path), copy=False)
    return captioner.to(device).eval()


def trimmed(ids: Tensor, pad: int) -> Tensor:
    """The ids (B, N) without the columns of padding at the end."""
    return ids[:, : int((ids != pad).sum(dim=1).max())].long()


# ============================================================================================================
# Published folders
# ============================================================================================================


def new_captioner(seed: int) -> tuple[BLIP, data.Preprocessing]:
    """An untrained blip-mini and its preprocessing."""
    config = CONFIGS["blip-mini"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BLIP(config, load_tokenizer(BLIP_MINI)).eval()
    return model, data.Preprocessing(**from_files(BLIP_MINI, "hf", "blip", config.vision_image_size))


def open_captioner(source: str, device: str = "cpu") -> tuple[BLIP, data.Preprocessing, Path]:
    """A BLIP, its preprocessing, and the folder of its tokenizer.

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
