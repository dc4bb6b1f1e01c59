"""Names: how other files spell what our models call by their home dialect, as tables.

Every model keeps the names of one published checkpoint (its home dialect, see models/). The tables below hold
the others. A row reads `their name: our name`; it renames a module or a parameter and with it everything
beneath it.

    {level}, {i}, ...     a number: every value that the model at hand has
    "name"                renamed
    Conv1x1("name")       their matrix (out, in) is our 1x1 convolution (out, in, 1, 1)
    Qkv("*_proj.weight")  their tensor is our q, k and v stacked along the first axis
    None                  dropped on purpose, the reason beside it

A name without a row is left as it is, so that strict loading reports it. Renaming is all that happens here,
with reshaping, splitting and stacking: it works on meta tensors and on gradients as on weights.
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


class Qkv(str):
    """Our names of three tensors, * standing for q, k and v, that the other dialect stacks into one."""


Row = str | None

# ----------------------------------------------------------------------------------------------------------
# U-Net. Home: LDM (`model.diffusion_model.` of a single file). LDM counts all blocks in one row, diffusers by
# level and by sort. With n ResBlocks a level going down and n + 1 going up:
#
#   down = 1 + (n + 1) level + i     down_last = (n + 1) (level + 1)     input_blocks.0 is a convolution
#   up   =     (n + 1) level + j     up_last   = (n + 1) level + n       both count from the coarsest level
#   slot = 2 after a transformer, 1 where the level has none
# ----------------------------------------------------------------------------------------------------------

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

# ----------------------------------------------------------------------------------------------------------
# Autoencoder. Home: LDM (`first_stage_model.` of a single file). Going down, both count levels from the
# finest. Going up, LDM keeps that numbering; diffusers counts from the coarsest: mirror = levels - 1 - level.
# ----------------------------------------------------------------------------------------------------------

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
    theirs: ours for theirs, ours in VAE_DIFFUSERS.items() if ".attentions." not in theirs
} | {
    "{coder}.mid_block.attentions.0.group_norm":             "{coder}.mid.attn_1.norm",
    "{coder}.mid_block.attentions.0.query":                  Conv1x1("{coder}.mid.attn_1.q"),
    "{coder}.mid_block.attentions.0.key":                    Conv1x1("{coder}.mid.attn_1.k"),
    "{coder}.mid_block.attentions.0.value":                  Conv1x1("{coder}.mid.attn_1.v"),
    "{coder}.mid_block.attentions.0.proj_attn":              Conv1x1("{coder}.mid.attn_1.proj_out"),
}

VAE_LDM: dict[str, Row] = {
    "loss":        None,  # perceptual and adversarial loss of the training
    "model_ema":   None,  # a second, averaged copy kept for the training
}

# ----------------------------------------------------------------------------------------------------------
# Text tower. Home: Hugging Face's, as the published `text_encoder` folders hold it; a single file of Stable
# Diffusion 1 holds the same beneath `cond_stage_model.transformer.`.
# ----------------------------------------------------------------------------------------------------------

CLIP_HF: dict[str, Row] = {
    "text_model.embeddings.position_ids":    None,  # 0, 1, 2, ...
    "text_projection":                       None,  # the U-Net reads the states before it
    "vision_model":                          None,  # the other tower of a whole CLIP
    "visual_projection":                     None,  # likewise
    "logit_scale":                           None,  # CLIP's temperature, used by its loss alone
}

# transformers 5 leaves the prefix out when it saves a CLIPTextModel.
CLIP_TRANSFORMERS_5: dict[str, Row] = {
    "embeddings.position_ids":               None,  # 0, 1, 2, ...
    "embeddings":                            "text_model.embeddings",
    "encoder":                               "text_model.encoder",
    "final_layer_norm":                      "text_model.final_layer_norm",
}

# A single file of Stable Diffusion 2, beneath `cond_stage_model.model.`. SD 2 reads the last but one of
# OpenCLIP-H's 24 layers through the final norm: the `beyond` after it are never used.
CLIP_OPEN_CLIP: dict[str, Row] = {
    "token_embedding":                         "text_model.embeddings.token_embedding",
    "positional_embedding":                    "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.{n}.ln_1":          "text_model.encoder.layers.{n}.layer_norm1",
    "transformer.resblocks.{n}.attn.in_proj_weight":
                                           Qkv("text_model.encoder.layers.{n}.self_attn.*_proj.weight"),
    "transformer.resblocks.{n}.attn.in_proj_bias":
                                           Qkv("text_model.encoder.layers.{n}.self_attn.*_proj.bias"),
    "transformer.resblocks.{n}.attn.out_proj": "text_model.encoder.layers.{n}.self_attn.out_proj",
    "transformer.resblocks.{n}.ln_2":          "text_model.encoder.layers.{n}.layer_norm2",
    "transformer.resblocks.{n}.mlp.c_fc":      "text_model.encoder.layers.{n}.mlp.fc1",
    "transformer.resblocks.{n}.mlp.c_proj":    "text_model.encoder.layers.{n}.mlp.fc2",
    "transformer.resblocks.{beyond}":          None,  # after the penultimate layer
    "ln_final":                                "text_model.final_layer_norm",
    "text_projection":                         None,  # the U-Net reads the states before it
    "logit_scale":                             None,  # CLIP's temperature, used by its loss alone
    "attn_mask":                               None,  # the causal mask, a constant
    "visual":                                  None,  # the other tower of a whole CLIP
}
# Files converted back from a diffusers folder hold 23 layers: they were cut there before.
OPEN_CLIP_CUT = 23

# ----------------------------------------------------------------------------------------------------------
# all-MiniLM-L6-v2. Home: Hugging Face's BertModel.
# ----------------------------------------------------------------------------------------------------------

BERT_HF: dict[str, Row] = {
    "embeddings.position_ids":       None,  # 0, 1, 2, ...
    "pooler":                        None,  # the sentence embedding is a mean over the tokens
}

BERT_PREFIXED: dict[str, Row] = {
    "bert.embeddings.position_ids":  None,  # 0, 1, 2, ...
    "bert.pooler":                   None,  # the sentence embedding is a mean over the tokens
    "bert":                          "",    # as models with a head of their own save it
    "cls":                           None,  # the head that pretraining used
}

# ----------------------------------------------------------------------------------------------------------
# Single files of Stable Diffusion: everything in one file, each part beneath its prefix.
# ----------------------------------------------------------------------------------------------------------

SINGLE_FILE: dict[str, tuple[str, ...]] = {
    "unet":      ("model.diffusion_model.",),
    "vae":       ("first_stage_model.",),
    "clip-text": ("cond_stage_model.transformer.",  # Stable Diffusion 1
                  "cond_stage_model.model."),       # Stable Diffusion 2
}
SINGLE_FILE["unet-encoder"] = SINGLE_FILE["unet"]

_SCHEDULE = "the noise schedule, which is computed from its formula"
SINGLE_FILE_IGNORED: dict[str, str] = {  # regex of a whole name -> why such a tensor is not missed
    r"betas":                               _SCHEDULE,
    r"(sqrt_|sqrt_recip_|sqrt_recipm1_|sqrt_one_minus_|log_one_minus_)?alphas_cumprod(_prev)?": _SCHEDULE,
    r"posterior_(variance|log_variance_clipped|mean_coef[12])": _SCHEDULE,
    r"denoiser\.sigmas":                    _SCHEDULE,
    r"logvar|lvlb_weights":                 "weights of the training's loss",
    r"model_ema\..*":                       "a second, averaged copy kept for the training",
    r"embedding_manager\..*":               "textual inversion, kept from the training",
    r"cond_stage_model\.logit_scale":       "CLIP's temperature, used by its loss alone",
    r"scale_factor":                        "the latents' scale: read as a size, not as a weight",
}


# ----------------------------------------------------------------------------------------------------------
# Reading the tables
# ----------------------------------------------------------------------------------------------------------


Numbers = dict[str, int | str]  # a value for some of a table's fields


@dataclass(frozen=True)
class Dialect:
    """One way to spell a kind of model, spoken where the regex `sign` matches the beginning of some name.

    `numbers` reads from the names in use which values the table's fields take together, with derived ones.
    """

    name: str
    sign: str
    table: Mapping[str, Row]
    numbers: Callable[[Iterable[str]], list[Numbers]] | None = None


def _taken(names: Iterable[str], pattern: str) -> set[int]:
    """The numbers that the regex's group takes at the names' beginnings."""
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}


def _unet_numbers(names: Iterable[str]) -> list[Numbers]:
    names = list(names)
    if any(name.startswith("input_blocks.") for name in names):
        steps = _taken(names, r"input_blocks\.(\d+)\.0\.op\.")
        n = min(steps) - 1 if steps else max(_taken(names, r"input_blocks\.(\d+)\."))
        levels = len(steps) + 1
        attended = {block // (n + 1) for block in _taken(names, r"output_blocks\.(\d+)\.1\.norm\.")}
    else:
        n = len(_taken(names, r"down_blocks\.\d+\.resnets\.(\d+)\."))
        levels = len(_taken(names, r"down_blocks\.(\d+)\."))
        attended = _taken(names, r"up_blocks\.(\d+)\.attentions\.")
    numbers: list[Numbers] = []
    for level in range(levels):
        first = (n + 1) * level
        numbers += [{"level": level, "i": i, "down": 1 + first + i} for i in range(n)]
        numbers += [{"level": level, "j": j, "up": first + j} for j in range(n + 1)]
        slot = 2 if level in attended else 1
        numbers += [{"level": level, "down_last": first + n + 1, "up_last": first + n, "slot": slot}]
    return numbers


def _vae_numbers(names: Iterable[str]) -> list[Numbers]:
    names = list(names)
    levels = len(_taken(names, r"encoder\.down(?:_blocks)?\.(\d+)\."))
    n = len(_taken(names, r"encoder\.down(?:_blocks)?\.\d+\.(?:resnets|block)\.(\d+)\."))
    numbers: list[Numbers] = [{"coder": "encoder"}, {"coder": "decoder"}]
    for level, j in product(range(levels), range(n + 1)):
        numbers += [{"level": level, "mirror": levels - 1 - level, "j": j}]
        numbers += [{"level": level, "i": j}] if j < n else []
    return numbers


def _open_clip_numbers(names: Iterable[str]) -> list[Numbers]:
    names = list(names)
    theirs = max(_taken(names, r"transformer\.resblocks\.(\d+)\."), default=-1) + 1
    ours = len(_taken(names, r"text_model\.encoder\.layers\.(\d+)\."))
    read = ours or (theirs if theirs == OPEN_CLIP_CUT else theirs - 1)
    return [*({"n": n} for n in range(read)), *({"beyond": n} for n in range(read, theirs))]


DIALECTS: dict[str, tuple[Dialect, ...]] = {  # of each kind; the first is home
    "unet": (
        Dialect("ldm", r"(input_blocks|middle_block|time_embed|output_blocks)\.", {}),
        Dialect("diffusers", r"(down_blocks|mid_block|up_blocks|time_embedding)\.",
                UNET_DIFFUSERS, _unet_numbers),
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
        Dialect("transformers-5", r"encoder\.layers\.", CLIP_TRANSFORMERS_5),
        Dialect("open_clip", r"transformer\.resblocks\.", CLIP_OPEN_CLIP, _open_clip_numbers),
    ),
    "minilm": (
        Dialect("hf", r"encoder\.layer\.", BERT_HF),
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
    """The dialect's table with every number filled in, for a model with these tensor names (theirs or
    ours)."""
    numbers = dialect.numbers(names) if dialect.numbers else []
    rows: dict[str, Row] = {}
    for theirs, ours in dialect.table.items():
        fields = set(re.findall(r"{(\w+)}", theirs + (ours or "")))
        for values in numbers if fields else [{}]:
            if fields <= values.keys():
                rows[theirs.format(**values)] = None if ours is None else type(ours)(ours.format(**values))
    return rows


def _split(name: str, rows: Mapping[str, Row]) -> tuple[str, str]:
    """The longest dotted beginning of `name` that has a row, and what follows it; ("", name) if there is
    none."""
    end = len(name)
    while end > 0:
        if name[:end] in rows:
            return name[:end], name[end:]
        end = name.rfind(".", 0, end)
    return "", ("." if "" in rows else "") + name


def to_home(kind: str, tensors: Mapping[str, Tensor], dialect: str | None = None) -> dict[str, Tensor]:
    """Tensors of any dialect under our names (and in our shapes); the dialect is told from the names.

    kind: "unet", "unet-encoder", "vae", "clip-text" or "minilm", without a single file's prefix. Names
    without a row stay as they are. The result shares memory with `tensors`. Raises WeightsError for names of
    no known dialect, or two tensors that claim one name.
    """
    spoken = _named(kind, dialect) if dialect else dialect_of(kind, tensors)
    rows = spelling(spoken, tensors)
    home: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        known, rest = _split(name, rows)
        row = rows.get(known, "")
        if row is None:
            continue
        for ours, part in _ours(row, rest, tensor):
            if ours in home:
                raise WeightsError(f"two tensors for {ours}, one of them {name}")
            home[ours] = part
    return home


def _ours(row: str, rest: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """What one of their tensors is to us."""
    if isinstance(row, Qkv):
        thirds = tensor.unflatten(0, (3, -1)) if tensor.shape[0] % 3 == 0 else [tensor] * 3
        return [(row.replace("*", letter), third) for letter, third in zip("qkv", thirds, strict=True)]
    if isinstance(row, Conv1x1) and tensor.ndim == 2:
        tensor = tensor[:, :, None, None]
    return [((row + rest).removeprefix("."), tensor)]


def from_home(kind: str, tensors: Mapping[str, Tensor], dialect: str = "diffusers") -> dict[str, Tensor]:
    """The reverse of `to_home`, for writing: tensors under our names -> under the names of `dialect`.

    What a dialect holds and we drop is not invented: the result lacks it. Raises WeightsError for a dialect
    that the kind does not have, and for a q without its k and v where they are stored as one.
    """
    rows = spelling(_named(kind, dialect), tensors)
    backwards = _backwards(rows)
    theirs: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        known, rest = _split(name, backwards)
        spelt = backwards.get(known, "")
        row = rows.get(spelt)
        if isinstance(row, Qkv):
            parts = [row.replace("*", letter) for letter in "qkv"]
            if not all(part in tensors for part in parts):
                raise WeightsError(f"{spelt} needs all of {', '.join(parts)}")
            if spelt not in theirs:
                theirs[spelt] = torch.cat([tensors[part] for part in parts])
            continue
        if isinstance(row, Conv1x1) and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        theirs[(spelt + rest).removeprefix(".")] = tensor
    return theirs


def speller(dialect: Dialect, names: Iterable[str]) -> Callable[[str], str]:
    """A function from our names to the dialect's, for messages; `names` are those of the file."""
    backwards = _backwards(spelling(dialect, names))

    def spell(name: str) -> str:
        known, rest = _split(name, backwards)
        return (backwards.get(known, "") + rest).removeprefix(".")

    return spell


def _backwards(rows: Mapping[str, Row]) -> dict[str, str]:
    """Our names -> theirs."""
    theirs: dict[str, str] = {}
    for name, row in rows.items():
        if isinstance(row, Qkv):
            theirs |= {row.replace("*", letter): name for letter in "qkv"}
        elif row is not None:
            theirs[str(row)] = name
    return theirs


def speaks(kind: str, names: Iterable[str]) -> bool:
    """Whether these tensor names are of that kind, in any dialect."""
    try:
        return bool(dialect_of(kind, names))
    except WeightsError:
        return False


def ignored_in_single_file(name: str) -> bool:
    """Whether a single file may hold this tensor beside the parts of the model (SINGLE_FILE_IGNORED)."""
    return any(re.fullmatch(pattern, name) for pattern in SINGLE_FILE_IGNORED)


def _named(kind: str, name: str) -> Dialect:
    for dialect in DIALECTS[kind]:
        if dialect.name == name:
            return dialect
    known = ", ".join(dialect.name for dialect in DIALECTS[kind])
    raise WeightsError(f"{kind} has no dialect {name!r}; it has {known}")
