"""Kind of block -> its two halves. A new architecture adds a line here and in finch_keys.py."""

from infctx.model.channel_mix import ChannelMix, EagleChannelMix, FinchChannelMix
from infctx.model.config import BlockKind
from infctx.model.gold import GoldTimeMix
from infctx.model.gptalpha import GPTAlphaTimeMix
from infctx.model.time_mix import EagleTimeMix, FinchC2TimeMix, FinchTimeMix, TimeMix

RECURRENT_PARTS: dict[BlockKind, tuple[type[TimeMix], type[ChannelMix]]] = {
    "6": (FinchTimeMix, FinchChannelMix),
    "5.2": (EagleTimeMix, EagleChannelMix),
    "6c2": (FinchC2TimeMix, FinchChannelMix),
}
ATTENTION_PARTS: dict[BlockKind, tuple[type[GoldTimeMix] | type[GPTAlphaTimeMix], type[ChannelMix]]] = {
    "gold": (GoldTimeMix, FinchChannelMix),
    "gptalpha": (GPTAlphaTimeMix, FinchChannelMix),
}
