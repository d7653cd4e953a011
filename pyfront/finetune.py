"""Fine-tuning from Python: `main`, its settings, and the step that makes a model trainable.

from fusetune.finetune import TrainConfig, main

train_config = TrainConfig()
train_config.update_config({"learning_rate": 5e-4, "batch_size": 32})
main(train_config=train_config)
"""

from fusetune.train.config import TrainConfig, UserError, update_config
from fusetune.train.model import apply_peft
from fusetune.train.run import main

__all__ = ["TrainConfig", "UserError", "apply_peft", "main", "update_config"]
