"""PEFT's layers."""

TABLE = {
    "peft.tuners.lora.layer.Linear": ("lora", "fusetune.nn.lora.LoraLinear", "fusetune.nn.lora.why_not"),
    "peft.tuners.lora.bnb.Linear4bit": ("lora", "fusetune.nn.lora_bnb.LoraLinear4bit", "fusetune.nn.lora.why_not"),
    "peft.tuners.lora.layer.Embedding": (
        "lora",
        "fusetune.nn.lora.LoraEmbedding",
        "fusetune.nn.lora.why_not_embedding",
    ),
}
