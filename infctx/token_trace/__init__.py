"""One token of a run's first step, followed from its file to the optimizer in ten stops; nothing is changed."""

from infctx.token_trace.stop import Stop, stops_as_json
from infctx.token_trace.trace import trace_token, without_files
from infctx.token_trace.traced_run import RunToTrace
from infctx.token_trace.words import stops_in_words

__all__ = ["RunToTrace", "Stop", "stops_as_json", "stops_in_words", "trace_token", "without_files"]
