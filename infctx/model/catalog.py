"""Version -> the two halves of its block. A new architecture adds a line here and in finch_keys.py."""

from infctx.model.channel_mix import EagleChannelMix, FinchChannelMix
from infctx.model.time_mix import EagleTimeMix, FinchTimeMix

BLOCK_PARTS = {
    "6": (FinchTimeMix, FinchChannelMix),
    "5.2": (EagleTimeMix, EagleChannelMix),
}
