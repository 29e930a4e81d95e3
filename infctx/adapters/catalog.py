"""Adapter kind -> the function that attaches it. A new kind adds a file and a line here."""

from infctx.adapters.full import attach_full
from infctx.adapters.peft_adapters import attach_peft
from infctx.adapters.state_tuning import attach_state

ATTACH = {
    "full": attach_full,
    "state": attach_state,
    "lora": attach_peft,
    "rslora": attach_peft,
    "dora": attach_peft,
    "pissa": attach_peft,
    "olora": attach_peft,
    "miss": attach_peft,
}
