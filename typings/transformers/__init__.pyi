from collections.abc import Callable
from typing import Any

from torch import nn

from . import masking_utils as masking_utils

__version__: str

class AttentionInterface:
    @classmethod
    def register(cls, key: str, value: Callable[..., Any]) -> None: ...
    def __getitem__(self, key: str) -> Callable[..., Any]: ...

class AttentionMaskInterface:
    @classmethod
    def register(cls, key: str, value: Callable[..., Any]) -> None: ...

class PreTrainedModel(nn.Module):
    config: Any
    def set_attn_implementation(self, attn_implementation: str) -> None: ...

class BertConfig:
    def __init__(self, **fields: Any) -> None: ...

class BertModel(PreTrainedModel):
    def __init__(self, config: BertConfig) -> None: ...

class BartConfig:
    def __init__(self, **fields: Any) -> None: ...

class BartModel(PreTrainedModel):
    def __init__(self, config: BartConfig) -> None: ...

class PegasusXConfig:
    def __init__(self, **fields: Any) -> None: ...

class PegasusXModel(PreTrainedModel):
    def __init__(self, config: PegasusXConfig) -> None: ...

class LlamaConfig:
    def __init__(self, **fields: Any) -> None: ...

class LlamaForCausalLM(PreTrainedModel):
    def __init__(self, config: LlamaConfig) -> None: ...

class ModernBertConfig:
    layer_types: list[str]
    def __init__(self, **fields: Any) -> None: ...

class ModernBertModel(PreTrainedModel):
    def __init__(self, config: ModernBertConfig) -> None: ...

class T5Config:
    def __init__(self, **fields: Any) -> None: ...

class T5EncoderModel(PreTrainedModel):
    def __init__(self, config: T5Config) -> None: ...

class AutoModelForCausalLM:
    @classmethod
    def from_pretrained(cls, name: str, **fields: Any) -> Any: ...

class AutoTokenizer:
    @classmethod
    def from_pretrained(cls, name: str, **fields: Any) -> Any: ...
