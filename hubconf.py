"""Models for `torch.hub.load`, in evaluation mode.

    tokenizer = torch.hub.load("owner/repository", "one_d_piece", "S-256")
    generator = torch.hub.load("path/of/a/clone", "maskgit", "maskgit_fashion", source="local")

This imports packages called `modeling` and `utils`; a process cannot use others of these names beside them.
"""

import collections.abc
import contextlib

dependencies = [
    "torch",
    "PIL",
    "einops",
    "huggingface_hub",
    "numpy",
    "omegaconf",
    "psutil",
    "safetensors",
    "tqdm",
    "yaml",
]


def one_d_piece(name: str = "one-d-piece_fashion", device: str = "cpu"):
    """A One-D-Piece tokenizer, `modeling.one_d_piece.OneDPiece`.

    Args:
        name: "S-256", "B-256" or "L-256", which are published on the Hugging Face hub; a bundled one, such as
            "one-d-piece_fashion"; or another checkpoint: a folder, a file, a repository of the Hugging Face hub.

    Raises:
        WeightsError: There is no such tokenizer, or it could not be downloaded.
    """
    with _clashes_named():
        from modeling.one_d_piece import OneDPiece
    return OneDPiece.from_pretrained(_repository("One-D-Piece", name), device=device)


def maskgit(name: str = "maskgit_fashion", device: str = "cpu"):
    """A MaskGIT generator of a tokenizer's tokens, `modeling.maskgit.ImageBert` or `UViTBert`.

    Args:
        name: As for `one_d_piece`; "S-256" is the published generator for the tokenizer of that name.

    Raises:
        WeightsError: There is no such generator, or it could not be downloaded.
    """
    with _clashes_named():
        from modeling.generators import load_generator
    return load_generator(checkpoint=_repository("MaskGIT_One-D-Piece", name), device=device)[0]


def _repository(family: str, name: str) -> str:
    return f"turing-motors/{family}-{name}" if name in ("S-256", "B-256", "L-256") else name


@contextlib.contextmanager
def _clashes_named() -> collections.abc.Iterator[None]:
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("modeling", "utils"):
            raise
        raise ImportError(
            f"another package called {package} is imported already, and this project needs its own: load the model in "
            "a process of its own"
        ) from error
