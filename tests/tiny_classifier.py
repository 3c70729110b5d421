"""A published image classifier that is made in a second: two classes, random weights."""

import io
from pathlib import Path

from cluster.storage import Artifact, Store
from tests import trained


def publish(store: Store, folder: Path, name: str = "digits") -> Artifact:
    """Commit such a model; Hugging Face layout in `folder/files`."""
    import torch

    from pipelines import families

    config = trained.image_config(Path(store.base), name=name)
    family = families.load(config.family)
    encoder = family.fit_encoder(config, trained.pictures(6), ["one", "零"])
    encoder.save(folder / "encoder")
    torch.manual_seed(0)
    model = family.build_model(config, encoder.facts())
    files = folder / "files"
    files.mkdir()
    family.export(config, model.eval(), folder / "encoder", files)
    staging = store.stage("model", name)
    return staging.commit(
        staging.copy_tree(files), fingerprint="f", config={}, detail={"family": family.name}
    )


def picture(place: int) -> bytes:
    """A PNG file: a bright square, on the left for even places and on the right for odd ones."""
    import numpy as np
    from PIL import Image

    row = trained.pictures(place + 1).to_pylist()[place]
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(row["height"], row["width"])
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
