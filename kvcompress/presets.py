"""Specs by name: what `CacheSpec.parse` takes in place of codecs, such as `balanced` or `trellis:auto3`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from kvcompress.spec import CacheSpec


@dataclass(frozen=True)
class Preset:
    """A spec with a name. source: its string, or the name of a JSON file in `kvcompress/embedded`."""

    source: str
    what: str

    def spec(self) -> CacheSpec:
        if self.source.endswith(".json"):
            return CacheSpec.from_json(resources.files("kvcompress.embedded").joinpath(self.source).read_text("utf-8"))
        return CacheSpec.parse(self.source)


PRESETS: dict[str, Preset] = {
    "quality": Preset("prerope+spectral4", "for when nothing may be lost"),
    "balanced": Preset("prerope+spectral3", "the default"),
    "max": Preset("prerope+spectral2", "the least memory at which text stays good"),
}
