"""The slot engine: what the rollout worker decodes with and the teacher worker scores with.

One cache with a fixed number of slots, each at its own position (slots.py), with full or sliding attention
(attention.py); on it, decoding of one token per row and
step (decode.py) and scoring of one chunk per row and step (score.py); distributions over outcomes (outcomes.py).
Users of the engine import from here.
"""

from actors.engine.attention import UnsupportedModelError
from actors.engine.decode import ClosedChunk, Decoder, Finish
from actors.engine.proof import self_test
from actors.engine.score import Scorer
from actors.engine.scored import OwnSupport, Scored, ScoreRequest
from actors.engine.shared import Shared
from actors.engine.slots import SlotCache, SlotModel
from actors.engine.writer import Writer

__all__ = [
    "ClosedChunk",
    "Decoder",
    "Finish",
    "OwnSupport",
    "ScoreRequest",
    "Scored",
    "Scorer",
    "Shared",
    "SlotCache",
    "SlotModel",
    "UnsupportedModelError",
    "Writer",
    "self_test",
]
