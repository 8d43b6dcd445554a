"""Frozen dataclasses for a run, one per section; `config_file` fills them from YAML files such as those under `configs/`."""

from dataclasses import dataclass, field

from sftrec_jax.config.check import require
from sftrec_jax.config.data import DataConfig, ProfileConfig
from sftrec_jax.config.decode import DecodeConfig, EvaluateConfig
from sftrec_jax.config.items import EmbeddingConfig, ItemsConfig, SemanticConfig
from sftrec_jax.config.model import LoraConfig, MeshConfig, ModelConfig
from sftrec_jax.config.prompt import PromptConfig, TasksConfig
from sftrec_jax.config.train import TrainConfig

__all__ = [
    "DataConfig",
    "DecodeConfig",
    "EmbeddingConfig",
    "EvaluateConfig",
    "ItemsConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "ProfileConfig",
    "PromptConfig",
    "RunConfig",
    "SemanticConfig",
    "TasksConfig",
    "TrainConfig",
]


@dataclass(frozen=True)
class RunConfig:
    """A run."""

    data: DataConfig = field(default_factory=DataConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    items: ItemsConfig = field(default_factory=ItemsConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        require(
            self.train.normaliser == "full" or self.decode.normaliser in ("level", "children"),
            f"train.normaliser is {self.train.normaliser}, which leaves other probabilities untrained, but decode.normaliser is "
            f"{self.decode.normaliser}; set decode.normaliser: level",
        )

    @property
    def drops(self) -> bool:
        """Whether steps draw dropout noise."""
        return self.train.dropout > 0 or (self.lora.dropout > 0 and self.train.method == "lora")
