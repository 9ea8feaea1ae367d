"""The slot engine: what the rollout worker decodes with and the teacher worker scores with.

One cache with a fixed number of slots, each at a position of its own (slots.py); on it, a token a row a step
(decode.py) and a chunk a row a step (score.py); what may come next, as numbers (outcomes.py). Users of the
engine import from here.
"""

from actors.engine.decode import ClosedChunk, Decoder, Finish
from actors.engine.score import Scored, Scorer, ScoreRequest
from actors.engine.slots import SlotCache, SlotModel, UnsupportedModelError, check_full_attention, self_test

__all__ = [
    "ClosedChunk",
    "Decoder",
    "Finish",
    "ScoreRequest",
    "Scored",
    "Scorer",
    "SlotCache",
    "SlotModel",
    "UnsupportedModelError",
    "check_full_attention",
    "self_test",
]
