"""Models: where they are, what they are, and which files they consist of. Nothing here loads weights into a
network, so nothing imports torch.
"""

from resshift.models.cache import cache_directory
from resshift.models.files import (
    METADATA_KEY,
    PIXELS,
    PRETRAINED,
    AnyModelConfig,
    Dtype,
    ModelFiles,
    WeightsError,
    read_model_config,
    write_model_config,
)
from resshift.models.locate import first_stage_file, locate_model, model_with, unet_file
from resshift.models.locations import is_elsewhere, is_weight_file, local_file, local_path
from resshift.models.published import RemoteFile, fetch

__all__ = [
    "METADATA_KEY",
    "PIXELS",
    "PRETRAINED",
    "AnyModelConfig",
    "Dtype",
    "ModelFiles",
    "RemoteFile",
    "WeightsError",
    "cache_directory",
    "fetch",
    "first_stage_file",
    "is_elsewhere",
    "is_weight_file",
    "local_file",
    "local_path",
    "locate_model",
    "model_with",
    "read_model_config",
    "unet_file",
    "write_model_config",
]
