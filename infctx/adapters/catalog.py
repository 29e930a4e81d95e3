"""Adapter kind -> the function that attaches it. A new kind adds a file and a line here."""

from infctx.adapters.full import FullFineTuning, attach_full
from infctx.adapters.peft_adapters import PeftAdapter, attach_lora

Adapter = FullFineTuning | PeftAdapter

ATTACH = {"full": attach_full, "lora": attach_lora}
