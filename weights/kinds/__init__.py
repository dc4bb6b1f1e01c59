"""The kinds of model that can be loaded, each with its dialects and sizes in a file of its own."""

from weights.kinds import bert, blip, blip2, clip, swin, unet, vae, vit
from weights.options import Kind
from weights.strict import WeightsError

KINDS: dict[str, Kind] = {kind.name: kind for kind in (
    bert.KIND, clip.TEXT, clip.VISION, vit.KIND, swin.KIND, blip.KIND, blip2.KIND, vae.KIND,
    unet.KIND, unet.ENCODER,
)}


def find_kind(name: str) -> Kind:
    """The kind of that name. Raises WeightsError if there is none."""
    if name not in KINDS:
        raise WeightsError(f"no kind of model is called {name!r}; the kinds are {', '.join(KINDS)}")
    return KINDS[name]
