"""Names: how other files spell what our models call by their home dialect, as tables.

Every model keeps the names of one published checkpoint (its home dialect, see models/). The tables below hold the
others. A row reads `their name: our name`; it renames a module or a parameter and with it everything beneath it.

    {level}, {i}, ...     a number: every value that the model at hand has
    "name"                renamed
    Conv1x1("name")       their matrix (out, in) is our 1x1 convolution (out, in, 1, 1)
    ("q", "k", "v")       their tensor is ours stacked along the first axis
    None                  dropped on purpose, the reason beside it

A name without a row is left as it is, so that strict loading reports it. Renaming is all that happens here, with
reshaping, splitting and stacking: it works on meta tensors and on gradients as on weights.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from weights.strict import WeightsError


class Conv1x1(str):
    """Our name of a 1x1 convolution that the other dialect stores as a matrix."""


Row = str | tuple[str, str, str] | None

# ------------------------------------------------------------------------------------------------------------
# U-Net. Home: LDM (`model.diffusion_model.` of a single file). LDM counts all blocks in one row; diffusers counts by
# level and by sort. With n ResBlocks a level going down and n + 1 going up, and `slot` the place after a level's
# transformer, if it has one:
#
#   down = 1 + (n + 1) level + i        down_last = (n + 1) (level + 1)        input_blocks.0 is the first convolution
#   up   =     (n + 1) level + j        up_last   = (n + 1) level + n          up_blocks.0 is the coarsest, as in LDM
# ------------------------------------------------------------------------------------------------------------

UNET_DIFFUSERS: dict[str, Row] = {
    "time_embedding.linear_1":                         "time_embed.0",
    "time_embedding.linear_2":                         "time_embed.2",
    "conv_in":                                         "input_blocks.0.0",

    "down_blocks.{level}.resnets.{i}.norm1":           "input_blocks.{down}.0.in_layers.0",
    "down_blocks.{level}.resnets.{i}.conv1":           "input_blocks.{down}.0.in_layers.2",
    "down_blocks.{level}.resnets.{i}.time_emb_proj":   "input_blocks.{down}.0.emb_layers.1",
    "down_blocks.{level}.resnets.{i}.norm2":           "input_blocks.{down}.0.out_layers.0",
    "down_blocks.{level}.resnets.{i}.conv2":           "input_blocks.{down}.0.out_layers.3",
    "down_blocks.{level}.resnets.{i}.conv_shortcut":   "input_blocks.{down}.0.skip_connection",
    "down_blocks.{level}.attentions.{i}":              "input_blocks.{down}.1",  # inside, both speak alike
    "down_blocks.{level}.downsamplers.0.conv":         "input_blocks.{down_last}.0.op",

    "mid_block.resnets.0.norm1":                       "middle_block.0.in_layers.0",
    "mid_block.resnets.0.conv1":                       "middle_block.0.in_layers.2",
    "mid_block.resnets.0.time_emb_proj":               "middle_block.0.emb_layers.1",
    "mid_block.resnets.0.norm2":                       "middle_block.0.out_layers.0",
    "mid_block.resnets.0.conv2":                       "middle_block.0.out_layers.3",
    "mid_block.attentions.0":                          "middle_block.1",
    "mid_block.resnets.1.norm1":                       "middle_block.2.in_layers.0",
    "mid_block.resnets.1.conv1":                       "middle_block.2.in_layers.2",
    "mid_block.resnets.1.time_emb_proj":               "middle_block.2.emb_layers.1",
    "mid_block.resnets.1.norm2":                       "middle_block.2.out_layers.0",
    "mid_block.resnets.1.conv2":                       "middle_block.2.out_layers.3",

    "up_blocks.{level}.resnets.{j}.norm1":             "output_blocks.{up}.0.in_layers.0",
    "up_blocks.{level}.resnets.{j}.conv1":             "output_blocks.{up}.0.in_layers.2",
    "up_blocks.{level}.resnets.{j}.time_emb_proj":     "output_blocks.{up}.0.emb_layers.1",
    "up_blocks.{level}.resnets.{j}.norm2":             "output_blocks.{up}.0.out_layers.0",
    "up_blocks.{level}.resnets.{j}.conv2":             "output_blocks.{up}.0.out_layers.3",
    "up_blocks.{level}.resnets.{j}.conv_shortcut":     "output_blocks.{up}.0.skip_connection",
    "up_blocks.{level}.attentions.{j}":                "output_blocks.{up}.1",
    "up_blocks.{level}.upsamplers.0.conv":             "output_blocks.{up_last}.{slot}.conv",

    "conv_norm_out":                                   "out.0",
    "conv_out":                                        "out.2",
}

# ------------------------------------------------------------------------------------------------------------
# Autoencoder. Home: LDM (`first_stage_model.` of a single file). Both count the encoder's levels from the finest; going
# up, LDM keeps that numbering and diffusers counts from the coarsest: mirror = levels - 1 - level.
# ------------------------------------------------------------------------------------------------------------

VAE_DIFFUSERS: dict[str, Row] = {
    "encoder.down_blocks.{level}.resnets.{i}.conv_shortcut": "encoder.down.{level}.block.{i}.nin_shortcut",
    "encoder.down_blocks.{level}.resnets.{i}":               "encoder.down.{level}.block.{i}",
    "encoder.down_blocks.{level}.downsamplers.0.conv":       "encoder.down.{level}.downsample.conv",
    "decoder.up_blocks.{level}.resnets.{j}.conv_shortcut":   "decoder.up.{mirror}.block.{j}.nin_shortcut",
    "decoder.up_blocks.{level}.resnets.{j}":                 "decoder.up.{mirror}.block.{j}",
    "decoder.up_blocks.{level}.upsamplers.0.conv":           "decoder.up.{mirror}.upsample.conv",

    "{coder}.mid_block.resnets.0":                           "{coder}.mid.block_1",
    "{coder}.mid_block.attentions.0.group_norm":             "{coder}.mid.attn_1.norm",
    "{coder}.mid_block.attentions.0.to_q":                   Conv1x1("{coder}.mid.attn_1.q"),
    "{coder}.mid_block.attentions.0.to_k":                   Conv1x1("{coder}.mid.attn_1.k"),
    "{coder}.mid_block.attentions.0.to_v":                   Conv1x1("{coder}.mid.attn_1.v"),
    "{coder}.mid_block.attentions.0.to_out.0":               Conv1x1("{coder}.mid.attn_1.proj_out"),
    "{coder}.mid_block.resnets.1":                           "{coder}.mid.block_2",
    "{coder}.conv_norm_out":                                 "{coder}.norm_out",
}

# What diffusers wrote before 0.15, and what the published Stable Diffusion folders still hold.
VAE_DIFFUSERS_OLD: dict[str, Row] = {
    theirs: ours for theirs, ours in VAE_DIFFUSERS.items() if not theirs.startswith("{coder}.mid_block.attentions")
} | {
    "{coder}.mid_block.attentions.0.group_norm":             "{coder}.mid.attn_1.norm",
    "{coder}.mid_block.attentions.0.query":                  Conv1x1("{coder}.mid.attn_1.q"),
    "{coder}.mid_block.attentions.0.key":                    Conv1x1("{coder}.mid.attn_1.k"),
    "{coder}.mid_block.attentions.0.value":                  Conv1x1("{coder}.mid.attn_1.v"),
    "{coder}.mid_block.attentions.0.proj_attn":              Conv1x1("{coder}.mid.attn_1.proj_out"),
}

VAE_LDM: dict[str, Row] = {
    "loss":                                                  None,  # perceptual and adversarial loss of the training
    "model_ema":                                             None,  # a second, averaged copy kept for the training
}

# ------------------------------------------------------------------------------------------------------------
# Text tower. Home: Hugging Face's, as the published `text_encoder` folders hold it, which is also what a single file of
# Stable Diffusion 1 holds beneath `cond_stage_model.transformer.`.
# ------------------------------------------------------------------------------------------------------------

CLIP_HF: dict[str, Row] = {
    "text_model.embeddings.position_ids":                    None,  # 0, 1, 2, ...
    "text_projection":                                       None,  # the U-Net reads the states before it
    "vision_model":                                          None,  # the other tower of a whole CLIP
    "visual_projection":                                     None,  # likewise
    "logit_scale":                                           None,  # CLIP's temperature, used by its loss alone
}

# transformers 5 leaves the prefix out when it saves a CLIPTextModel.
CLIP_TRANSFORMERS_5: dict[str, Row] = {
    "embeddings.position_ids":                               None,  # 0, 1, 2, ...
    "embeddings":                                            "text_model.embeddings",
    "encoder":                                               "text_model.encoder",
    "final_layer_norm":                                      "text_model.final_layer_norm",
}

# A single file of Stable Diffusion 2, beneath `cond_stage_model.model.`. `beyond` are the layers after the one that is
# read: SD 2 reads the last but one of OpenCLIP-H's 24 through the final norm, so the last is never used.
CLIP_OPEN_CLIP: dict[str, Row] = {
    "token_embedding":                                       "text_model.embeddings.token_embedding",
    "positional_embedding":                                  "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.{layer}.ln_1":                    "text_model.encoder.layers.{layer}.layer_norm1",
    "transformer.resblocks.{layer}.attn.in_proj_weight":    ("text_model.encoder.layers.{layer}.self_attn.q_proj.weight",
                                                             "text_model.encoder.layers.{layer}.self_attn.k_proj.weight",
                                                             "text_model.encoder.layers.{layer}.self_attn.v_proj.weight"),
    "transformer.resblocks.{layer}.attn.in_proj_bias":      ("text_model.encoder.layers.{layer}.self_attn.q_proj.bias",
                                                             "text_model.encoder.layers.{layer}.self_attn.k_proj.bias",
                                                             "text_model.encoder.layers.{layer}.self_attn.v_proj.bias"),
    "transformer.resblocks.{layer}.attn.out_proj":           "text_model.encoder.layers.{layer}.self_attn.out_proj",
    "transformer.resblocks.{layer}.ln_2":                    "text_model.encoder.layers.{layer}.layer_norm2",
    "transformer.resblocks.{layer}.mlp.c_fc":                "text_model.encoder.layers.{layer}.mlp.fc1",
    "transformer.resblocks.{layer}.mlp.c_proj":              "text_model.encoder.layers.{layer}.mlp.fc2",
    "transformer.resblocks.{beyond}":                        None,  # after the penultimate layer
    "ln_final":                                              "text_model.final_layer_norm",
    "text_projection":                                       None,  # the U-Net reads the states before it
    "logit_scale":                                           None,  # CLIP's temperature, used by its loss alone
    "attn_mask":                                             None,  # the causal mask, a constant
    "visual":                                                None,  # the other tower of a whole CLIP
}
# Files converted back from a diffusers folder hold 23 layers: they were cut there before.
OPEN_CLIP_CUT = 23

# ------------------------------------------------------------------------------------------------------------
# all-MiniLM-L6-v2. Home: Hugging Face's BertModel.
# ------------------------------------------------------------------------------------------------------------

BERT_HF: dict[str, Row] = {
    "embeddings.position_ids":                               None,  # 0, 1, 2, ...
    "pooler":                                                None,  # the sentence embedding is a mean over the tokens
}

BERT_PREFIXED: dict[str, Row] = {
    "bert.embeddings.position_ids":                          None,  # 0, 1, 2, ...
    "bert.pooler":                                           None,  # the sentence embedding is a mean over the tokens
    "bert":                                                  "",    # as models with a head of their own save it
    "cls":                                                   None,  # the head that pretraining used
}

# ------------------------------------------------------------------------------------------------------------
# Single files of Stable Diffusion: everything in one file, each part beneath its prefix.
# ------------------------------------------------------------------------------------------------------------

SINGLE_FILE: dict[str, tuple[str, ...]] = {
    "unet":      ("model.diffusion_model.",),
    "vae":       ("first_stage_model.",),
    "clip-text": ("cond_stage_model.transformer.",  # Stable Diffusion 1
                  "cond_stage_model.model."),       # Stable Diffusion 2
}

SINGLE_FILE_IGNORED: dict[str, str] = {
    r"model_ema\..*":                              "a second, averaged copy kept for the training",
    r"(log_)?(sqrt_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?": "noise schedule, computed from its formula",
    r"betas|posterior_(variance|log_variance_clipped|mean_coef[12])":      "noise schedule, computed from its formula",
    r"denoiser\.sigmas":                           "noise schedule, computed from its formula",
    r"logvar|lvlb_weights":                        "weights of the training's loss",
    r"cond_stage_model\.logit_scale":              "CLIP's temperature, used by its loss alone",
    r"embedding_manager\..*":                      "textual inversion, kept from the training",
    r"scale_factor":                               "the latents' scale: read as a size, not as a weight",
}


# ------------------------------------------------------------------------------------------------------------
# Reading the tables
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dialect:
    """One way to spell a kind of model. `sign` is a regex: the dialect is spoken where it matches some name's start.

    `numbers` reads from the names in use which values the table's fields take and, for each of them, the derived ones.
    """

    name: str
    sign: str
    table: Mapping[str, Row]
    numbers: Callable[[Iterable[str]], Iterable[dict[str, int | str]]] | None = None


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that the regex's group takes; 0 if it matches no name."""
    found = [int(match[1]) for name in names if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def _unet_numbers(names: Iterable[str]) -> list[dict[str, int | str]]:
    names = list(names)
    if any(name.startswith("input_blocks.") for name in names):
        steps = [int(m[1]) for name in names if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.", name))]
        blocks = _count(names, r"input_blocks\.(\d+)\.")
        n = min(steps) - 1 if steps else blocks - 1
        levels = len(set(steps)) + 1
        attended = {int(m[1]) // (n + 1) for name in names if (m := re.match(r"output_blocks\.(\d+)\.1\.norm\.", name))}
    else:
        n = _count(names, r"down_blocks\.\d+\.resnets\.(\d+)\.")
        levels = _count(names, r"down_blocks\.(\d+)\.")
        attended = {int(m[1]) for name in names if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    down = ({"level": level, "i": i, "down": 1 + (n + 1) * level + i} for level in range(levels) for i in range(n))
    up = ({"level": level, "j": j, "up": (n + 1) * level + j} for level in range(levels) for j in range(n + 1))
    ends = (
        {"level": level, "down_last": (n + 1) * (level + 1), "up_last": (n + 1) * level + n,
         "slot": 2 if level in attended else 1}
        for level in range(levels)
    )
    return [*down, *up, *ends]


def _vae_numbers(names: Iterable[str]) -> list[dict[str, int | str]]:
    names = list(names)
    levels = _count(names, r"encoder\.down(?:_blocks)?\.(\d+)\.")
    blocks = _count(names, r"encoder\.down(?:_blocks)?\.\d+\.(?:resnets|block)\.(\d+)\.")
    numbers = [
        {"level": level, "mirror": levels - 1 - level, "i": i, "j": j}
        for level, i, j in product(range(levels), range(blocks), range(blocks + 1))
    ]
    return [*numbers, {"coder": "encoder"}, {"coder": "decoder"}]


def _open_clip_numbers(names: Iterable[str]) -> list[dict[str, int | str]]:
    names = list(names)
    theirs = _count(names, r"transformer\.resblocks\.(\d+)\.")
    read = theirs if theirs == OPEN_CLIP_CUT else theirs - 1
    read = _count(names, r"text_model\.encoder\.layers\.(\d+)\.") or read
    return [*({"layer": n} for n in range(read)), *({"beyond": n} for n in range(read, theirs))]


DIALECTS: dict[str, tuple[Dialect, ...]] = {  # of each kind; the first is home
    "unet": (
        Dialect("ldm", r"(input_blocks|middle_block|time_embed|output_blocks)\.", {}),
        Dialect("diffusers", r"(down_blocks|mid_block|up_blocks|time_embedding)\.", UNET_DIFFUSERS, _unet_numbers),
    ),
    "vae": (
        Dialect("ldm", r"(encoder\.(down|mid)|decoder\.(up|mid))\.", VAE_LDM),
        Dialect("diffusers-old", r"(encoder|decoder)\.mid_block\.attentions\.0\.(query|proj_attn)\.",
                VAE_DIFFUSERS_OLD, _vae_numbers),
        Dialect("diffusers", r"(encoder\.(down_blocks|mid_block)|decoder\.(up_blocks|mid_block))\.",
                VAE_DIFFUSERS, _vae_numbers),
    ),
    "clip-text": (
        Dialect("diffusers", r"text_model\.", CLIP_HF),
        Dialect("transformers-5", r"(embeddings|encoder\.layers|final_layer_norm)\.", CLIP_TRANSFORMERS_5),
        Dialect("open_clip", r"transformer\.resblocks\.", CLIP_OPEN_CLIP, _open_clip_numbers),
    ),
    "minilm": (
        Dialect("hf", r"(encoder\.layer|embeddings)\.", BERT_HF),
        Dialect("hf-prefixed", r"bert\.", BERT_PREFIXED),
    ),
}
DIALECTS["unet-encoder"] = DIALECTS["unet"]


def dialect_of(kind: str, names: Iterable[str]) -> Dialect:
    """The dialect of `kind` that these tensor names speak. Raises WeightsError if it is none of them."""
    names = list(names)
    for dialect in DIALECTS[kind]:
        if any(re.match(dialect.sign, name) for name in names):
            return dialect
    spoken = ", ".join(dialect.name for dialect in DIALECTS[kind])
    shown = ", ".join(names[:3]) or "nothing at all"
    raise WeightsError(f"no {kind} in any dialect known here ({spoken}); the names are {shown} ...")


def spelling(dialect: Dialect, names: Iterable[str]) -> dict[str, Row]:
    """The dialect's table with every number filled in, for a model with these tensor names (theirs or ours)."""
    numbers = list(dialect.numbers(names)) if dialect.numbers else []
    rows: dict[str, Row] = {}
    for theirs, ours in dialect.table.items():
        fields = set(re.findall(r"{(\w+)}", theirs))
        if not fields:
            rows[theirs] = ours
        for values in (v for v in numbers if _covers(v, theirs, ours)):
            rows[theirs.format(**values)] = _format(ours, values)
    return rows


def _covers(values: Mapping[str, int | str], theirs: str, ours: Row) -> bool:
    text = theirs + "".join(ours if isinstance(ours, tuple) else [ours or ""])
    fields = set(re.findall(r"{(\w+)}", text))
    return bool(fields) and fields <= values.keys()


def _format(ours: Row, values: Mapping[str, int | str]) -> Row:
    if ours is None:
        return None
    if isinstance(ours, tuple):
        return tuple(name.format(**values) for name in ours)
    return type(ours)(ours.format(**values))


def _find(name: str, rows: Mapping[str, Row]) -> tuple[str, str]:
    """The longest dotted beginning of `name` that has a row, and what follows it; ("", name) if there is none."""
    end = len(name)
    while end > 0:
        if name[:end] in rows:
            return name[:end], name[end:]
        end = name.rfind(".", 0, end)
    return "", name


def to_home(kind: str, tensors: Mapping[str, Tensor], dialect: str | None = None) -> dict[str, Tensor]:
    """Tensors of any dialect under our names (and in our shapes); the dialect is told from the names.

    kind: "unet", "unet-encoder", "vae", "clip-text" or "minilm", without a single file's prefix. Names without a row
    stay as they are. The result shares memory with `tensors`. Raises WeightsError for names of no known dialect or
    two tensors that claim one name.
    """
    spoken = _named(kind, dialect) if dialect else dialect_of(kind, tensors)
    rows = spelling(spoken, tensors)
    home: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        known, rest = _find(name, rows)
        row = rows[known] if known else ""
        if row is None:
            continue
        if isinstance(row, tuple):
            parts = list(zip(row, tensor.chunk(len(row)), strict=False))
        elif isinstance(row, Conv1x1) and tensor.ndim == 2:
            parts = [(row + rest, tensor[:, :, None, None])]
        else:
            parts = [((row + rest).removeprefix("."), tensor)]
        for ours, part in parts:
            if ours in home:
                raise WeightsError(f"two tensors for {ours}, one of them {name}")
            home[ours] = part
    return home


def from_home(kind: str, tensors: Mapping[str, Tensor], dialect: str = "diffusers") -> dict[str, Tensor]:
    """The reverse of `to_home`, for writing: tensors under our names -> under the names of `dialect`.

    What a dialect holds and we drop is not invented: the result lacks it. Raises WeightsError for a dialect that the
    kind does not have.
    """
    spoken = _named(kind, dialect)
    rows = spelling(spoken, tensors)
    backwards: dict[str, str] = {ours: theirs for theirs, ours in rows.items() if isinstance(ours, str)}
    stacks = {ours[0]: (theirs, ours) for theirs, ours in rows.items() if isinstance(ours, tuple)}
    members = {name for _, ours in stacks.values() for name in ours}
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in stacks:
            theirs, ours = stacks[name]
            out[theirs] = torch.cat([tensors[part] for part in ours])
            continue
        if name in members:
            continue
        known, rest = _find(name, backwards)
        theirs = backwards[known] if known else ""
        if known and isinstance(rows[theirs], Conv1x1) and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        out[(theirs + rest).removeprefix(".")] = tensor
    return out


def _named(kind: str, name: str) -> Dialect:
    for dialect in DIALECTS[kind]:
        if dialect.name == name:
            return dialect
    known = ", ".join(dialect.name for dialect in DIALECTS[kind])
    raise WeightsError(f"{kind} has no dialect {name!r}; it has {known}")
