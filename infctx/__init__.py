"""Fine-tune RWKV-6 Finch and Eagle models on documents of any length, with the exact gradient through the chunks."""
