"""Low-rank adapters (LoRA, arXiv 2106.09685): a small update beside frozen kernels.

y = x W + (α / r) (x A) B,   A random, B zero at the start
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which linear maps get an adapter, and its size.

    Args:
      rank: r.
      alpha: α; the update is scaled by α / r.
      targets: regular expression, searched in names such as 'attention/query' and
        'mlp/down'.
    """

    rank: int
    alpha: float
    targets: str

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def adapts(self, name: str) -> bool:
        return re.search(self.targets, name) is not None
