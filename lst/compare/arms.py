"""The models of the paper's Tables 3 and 4, by name (paper, section 4.2).

An arm is a change to a common configuration: how speech is cut and which architecture reads it.
Everything else, the corpus, the optimisation, the widths and depths, is the same in all arms.
"""

from dataclasses import dataclass, replace
from typing import Literal

from lst.train.config import TrainConfig

__all__ = ["ARMS", "Arm"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model of a comparison."""

    name: str
    title: str  # of its row in a table
    patching: Literal["none", "speech-bpe", "static", "aligned", "mixed", "curriculum"]
    text_path: Literal["local", "global"] = "local"

    @property
    def token_level(self) -> bool:
        """Whether the global transformer alone reads every token."""
        return self.patching in ("none", "speech-bpe")

    def configure(self, base: TrainConfig) -> TrainConfig:
        """``base`` as this arm runs it."""
        return replace(
            base,
            name=f"{base.name}-{self.name}",
            model=replace(
                base.model,
                architecture="token" if self.token_level else "lst",
                text_path=self.text_path,
            ),
            data=replace(base.data, patching=replace(base.data.patching, strategy=self.patching)),
        )


_ARMS = (
    Arm(name="baseline", title="Base SpeechLLM", patching="none"),
    Arm(name="bpe", title="BPE SpeechLLM", patching="speech-bpe"),
    Arm(name="static", title="LST (Static)", patching="static"),
    Arm(name="aligned", title="LST (Aligned)", patching="aligned"),
    Arm(name="mixed", title="LST (Mixed)", patching="mixed"),
    Arm(name="curriculum", title="LST (Curriculum)", patching="curriculum"),
    Arm(
        name="curriculum-global",
        title="LST (Curriculum, text_path global)",
        patching="curriculum",
        text_path="global",
    ),
)

#: In the order of the tables.
ARMS: dict[str, Arm] = {arm.name: arm for arm in _ARMS}
