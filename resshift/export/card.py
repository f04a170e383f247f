"""The card of a model: metadata that a model hub reads as a YAML header, and what a reader needs.

The header follows https://huggingface.co/docs/hub/model-cards: license, library_name, pipeline_tag, tags.
"""

from __future__ import annotations

import json
import re

from resshift.config import ModelConfig, to_dict
from resshift.export import chain_config, model_name
from resshift.models import PRETRAINED, ModelFiles


def header(config: ModelConfig, licence: str) -> str:
    """Return the YAML header, lines of dashes included.

    Args:
        config: Configuration of the model.
        licence: Licence of the weights as the Hub spells it, for example apache-2.0.
    """
    tags = ["super-resolution", "image-upscaling", "residual-shifting", f"x{config.scale}"]
    if config.unet.cond_mask:
        tags.append("inpainting")
    lines = [
        "---",
        f"license: {licence}",
        "library_name: resshift",
        "pipeline_tag: image-to-image",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
        "",
    ]
    return "\n".join(lines)


def model_card(found: ModelFiles, licence: str | None = None) -> str:
    """Return the card of a model: the one beside its weights if there is one, otherwise what the
    configuration says; with a header.

    Args:
        found: The model.
        licence: Licence of the weights; None: that of the package for models that ship with it, otherwise
            unknown.

    Raises:
        ConfigError: The model has no chain.
    """
    config = chain_config(found)
    ships = found.unet.is_relative_to(PRETRAINED)
    top = header(config, licence or ("apache-2.0" if ships else "unknown"))
    own = found.unet.with_name("README.md")
    if not own.is_file():
        return top + _plain_card(model_name(found), config)
    text = own.read_text()
    if text.startswith("---\n"):
        return text
    # Links into the repository lead nowhere on a hub.
    return top + re.sub(r"\[([^\]]+)\]\(\.\.?/[^)]*\)", r"\1", text)


def _plain_card(name: str, config: ModelConfig) -> str:
    stage = "a VQ autoencoder" if config.first_stage.kind == "vq" else "unshuffled pixels"
    return f"""# Model card: {name}

Super-resolution x{config.scale} by residual shifting: a chain of {config.schedule.steps} step(s) on
{stage} (Yue, Wang and Loy, NeurIPS 2023).

```python
from PIL import Image
from resshift import Upscaler

up = Upscaler.from_pretrained("DIRECTORY_OF_THIS_FILE")
up(Image.open("photo.jpg")).save("photo_x{config.scale}.png")
```

## Limits

The training data and the licence of this model are known to its owner; this card was made from the
configuration alone. Invented detail can do harm: do not use it for evidence, medicine or identity.

## Configuration

```json
{json.dumps(to_dict(config), indent=2)}
```
"""
