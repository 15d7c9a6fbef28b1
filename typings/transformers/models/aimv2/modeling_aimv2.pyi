from transformers import PreTrainedModel

from .configuration_aimv2 import Aimv2TextConfig

class Aimv2TextModel(PreTrainedModel):
    def __init__(self, config: Aimv2TextConfig) -> None: ...
