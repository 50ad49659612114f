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


#: Bits and KL in nats per token: of the embedded model (heads of 64) at 4096 tokens, python -m benchmarks quality.
PRESETS: dict[str, Preset] = {
    "quality": Preset("prerope+spectral4", "4.5 bits, KL 5.6e-4: less than any peer's method loses at 5 bits"),
    "balanced": Preset(
        "prerope+spectral3", "the default; 3.5 bits, KL 1.3e-3: little more than half of TurboQuant's at 4.3"
    ),
    "max": Preset("prerope+spectral2", "2.5 bits, KL 4.1e-3: little more than half of TurboQuant's at 3.3"),
    # cat austen--emma.txt darwin--on-the-origin-of-species.txt > books.txt
    # kvcompress calibrate --text books.txt --bits 3 --output kvcompress/embedded/trellis-auto3.json
    "trellis:auto3": Preset("trellis-auto3.json", "an example: what calibrate gave the embedded model at 3 bits"),
}
