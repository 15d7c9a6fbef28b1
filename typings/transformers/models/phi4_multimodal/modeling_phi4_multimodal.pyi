from transformers import PreTrainedModel

from .configuration_phi4_multimodal import Phi4MultimodalVisionConfig

class Phi4MultimodalVisionModel(PreTrainedModel):
    def __init__(self, config: Phi4MultimodalVisionConfig) -> None: ...
