"""Shared by the parts of Stable Diffusion."""

from weights.strict import WeightsError

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
    r"v_pred":                             "an empty mark that the U-Net predicts v: `generate.trained_as`",
    r"scale_factor":                        "the latents' scale: read as a size, not as a weight",
}


def multiples(widths: list[int], where: str) -> tuple[int, ...]:
    """Each level's width as a multiple of the first one's."""
    if any(width % widths[0] for width in widths):
        raise WeightsError(f"{where}: block_out_channels = {widths}: not multiples of the first")
    return tuple(width // widths[0] for width in widths)
