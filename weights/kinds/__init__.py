"""The kinds of model that can be loaded, each with its dialects and sizes in a file of its own."""

from weights.kinds import bert, blip, clip_text, clip_vision, swin, unet, vae, vit
from weights.kinds.common import Kind

KINDS: dict[str, Kind] = {
    "minilm": bert.KIND,
    "clip-text": clip_text.KIND,
    "clip-vision": clip_vision.KIND,
    "vit": vit.KIND,
    "swin": swin.KIND,
    "blip": blip.KIND,
    "vae": vae.KIND,
    "unet": unet.KIND,
    "unet-encoder": unet.ENCODER,
}
