"""Subjects of golden files that consist of more than one kind: the regressor and the sampler.

Only the command line imports this file: it imports parts of the project that import weights.
"""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from models.layers import Namespace, timestep_embedding
from weights.golden import TINY, Draw, Subject, load_or_draw, randomised
from weights.kinds import KINDS

N_WORDS = 100  # of the vocabulary head, where the source is not a run
STEPS, GUIDANCE = 4, 7.5  # of the sampler


def regressor(source: str, draw: Draw) -> Subject:
    """A run's regressor, or one with random heads on pretrained weights; of sd-mini's U-Net by default.

    The U-Net reads latents and a caption's states at timestep 0; its features are those of the run, or the
    maximum over the middle block's places. Outputs: `embedding` (B, 384), not normalised, and `logits` (B,
    words). Raises WeightsError for a run or weights that cannot be loaded.
    """
    from backbones import BACKBONES, as_backbone
    from reverse_sd import Regressor, frozen_backbone, load_run

    if (Path(source) / "vocabulary.json").is_file():
        run = load_run(source)
        name, model, placement = run.config["backbone"], run.regressor, run.config["heads"]
        features = run.config.get("unet_features")
        if run.frozen:
            model.backbone = frozen_backbone(run, "cpu")
    else:
        name = next((name for name, backbone in BACKBONES.items() if backbone.mini == source), "unet")
        network, placement, features = load_or_draw(BACKBONES[name].kind, source), 3, None
        model = Regressor(as_backbone(name, network), network.width, N_WORDS, placement).eval()
        randomised(model.heads)
    network = model.backbone.unet if BACKBONES[name].white_box else model.backbone
    inputs, constants = KINDS[BACKBONES[name].kind].example_inputs(network.config, draw), {}
    if "timesteps" in inputs:
        constants["timesteps"] = torch.zeros_like(inputs.pop("timesteps"))
        constants["sinusoids"] = timestep_embedding(constants["timesteps"], network.config.model_channels)

    def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        prediction = model(*inputs.values())
        logits = {} if prediction.logits is None else {"logits": prediction.logits}
        return {"embedding": prediction.embedding} | logits

    config = {"backbone": name, "heads": placement, "model": asdict(network.config)}
    config |= {"unet_features": features} if features else {}
    return Subject(model, inputs, outputs, constants, config)


def sampler(source: str, draw: Draw) -> Subject:
    """DDIM's steps with classifier-free guidance, from noise to latents, by the U-Net of `source`.

    Activations: the U-Net's outputs, for the negative context first; outputs: the latents after each step.
    """
    from generate import Pipeline, alphas_of, ddim_timesteps, trained_as

    network = load_or_draw("unet", source)
    predicts_v = source in TINY or bool(trained_as(source)[1])
    alphas = alphas_of("sd-2" if source in TINY else source)
    width = network.config.context_dim
    inputs = {"noise": draw.normal(network.config.in_channels, 8, 8), "context": draw.normal(77, width),
              "negative": draw.normal(77, width)[:1]}

    def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        pipeline, latents = Pipeline(model.unet, None, None, None, predicts_v, alphas), {}
        pipeline.states = lambda texts: inputs[texts[0]]
        pipeline.sample(["context"], inputs["noise"], "negative", STEPS, GUIDANCE,
                        on_step=lambda step, x: latents.update({f"latents.{step}": x}))
        return latents

    constants = {"alphas_bar": alphas, "timesteps": torch.tensor(ddim_timesteps(STEPS))}
    config = {"steps": STEPS, "guidance": GUIDANCE, "predicts_v": predicts_v, "unet": asdict(network.config)}
    return Subject(Namespace(unet=network), inputs, outputs, constants, config, layers=("unet",))


WHOLES = {"regressor": regressor, "sampler": sampler}
