"""PEFT's layers."""

TABLE = {
    "peft.tuners.lora.layer.Linear": ("lora", "fusetune.nn.lora.LoraLinear", "fusetune.nn.lora.why_not"),
}
