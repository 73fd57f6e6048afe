"""The lines of a model card that show how its model is used."""

import re

_CLASSIFY = """
```python
import linsight

run = linsight.from_pretrained("{name}")
print(run.predict("photo.jpg")[0].classes)
```
"""
_TIMM = """
```python
import linsight  # timm knows its models from here on
import timm
import torch

model = timm.create_model("hf-hub:{name}", pretrained=True).eval()
output = model(torch.randn(1, {channels}, {height}, {width}))
```
"""
_TRANSFORMERS = """
```python
import linsight  # transformers knows its models through timm
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModelForImageClassification.from_pretrained("{name}")
```
"""


def usage(name: str, input_size: tuple[int, int, int], classifies: bool) -> str:
    """The section on the use of the model OWNER/NAME."""
    name = name if re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) else "OWNER/NAME"
    channels, height, width = input_size
    parts = [_CLASSIFY if classifies else "", _TIMM, _TRANSFORMERS if classifies else ""]
    filled = "".join(part.format(name=name, channels=channels, height=height, width=width) for part in parts)
    return f"## Use\n{filled}"
