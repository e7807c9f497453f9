"""The model card that is written beside a pipeline's weights: facts filled in, the rest marked for its maker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fvgen.system.files import write_text

CARD = """---
library_name: diffusers
pipeline_tag: image-to-video
tags: [novel-view-synthesis, video-diffusion, fvgen{tag}]
license: other
---

# {title}

{what}

| | |
|---|---|
| pipeline | `{kind}` |
| network | {parameters:.2f} M parameters, trained with {frames} frames |
| frames | height and width in multiples of {multiple} |
| sampling | {sampling} |

```python
import torch
from fvgen.pipelines import {kind}

pipeline = {kind}.from_pretrained("PATH_OR_HUB_ID")
video = pipeline(render, torch.Generator().manual_seed(0){guide})  # renders [B, F, 3, H, W] in [0, 1] in, frames out
```

## To be filled in before publishing

* **Training**: teacher, data, iterations, settings (a run of `fvgen` leaves them in `config.yaml` and `summary.json`).
* **Scores**: the table of `benchmarks/quality.py`, with the scenes on which they were taken.
* **Licence**: that of the teacher's weights and of the training data binds the student too; name it in the header.
* **Limits**: what the model has not seen, and how it fails.
"""


def card(pipeline: Any) -> str:
    """The text of a model card for a teacher or a student."""
    kind, config = type(pipeline).__name__, pipeline.config
    student = "guidance" not in config
    network, guided = pipeline.network, pipeline.wants_cameras
    if student:
        what = "A few-step student for novel views, distilled with fvgen."
        sampling = f"{config.steps} steps, one network evaluation each, no guidance"
    else:
        what = f"A {pipeline.family.name} teacher for novel views, to be used or distilled with fvgen."
        sampling = f"{config.steps} DDIM steps, guidance {config.guidance:g} (rescale {config.guidance_rescale:g})"
        if guided and config.camera_guidance != 1.0:
            sampling += f", camera guidance {config.camera_guidance:g}"
    return CARD.format(
        tag=", distillation" if student else "",
        title=f"{config.steps}-step novel-view student" if student else "Novel-view teacher",
        what=what,
        kind=kind,
        parameters=sum(parameter.numel() for parameter in network.parameters()) / 1e6,
        frames=pipeline.frames,
        multiple=pipeline.size_multiple,
        sampling=sampling,
        guide=", cameras=path" if guided else "",
    )


def write_card(pipeline: Any, folder: Path) -> None:
    """Write README.md into a model folder that has none."""
    readme = folder / "README.md"
    if not readme.exists():
        write_text(readme, card(pipeline))
