"""Which checkpoint is what: registry, fetching, dialects, strict loading."""

from weights.dialects import from_home, to_home
from weights.strict import WeightsError, load_strict

__all__ = ["WeightsError", "from_home", "load_strict", "to_home"]
