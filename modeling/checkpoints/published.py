"""What the published, the bundled and the loose checkpoints are called, and the configuration of each."""

from utils.paths import ROOT

BUNDLED = {
    name: ROOT / "assets/models" / name
    for name in (
        "one-d-piece_fashion",
        "maskgit_fashion",
        "pixel_vqgan_fashion",
        "one-d-piece_emoji",
        "maskgit_emoji",
    )
}
# The published repositories that hold no config.json, and the loose files, get their configuration from this project.
PUBLISHED = {
    **{f"turing-motors/One-D-Piece-{size}-256": f"configs/eval/one-d-piece_{size.lower()}256.yaml" for size in "SBL"},
    **{
        f"turing-motors/MaskGIT_One-D-Piece-{size}-256": (
            f"configs/training/generator/maskgit_one-d-piece_{size.lower()}256.yaml"
        )
        for size in "SBL"
    },
}
TITOK_REPOSITORY = "fun-research/TiTok"
TITOK_FILES = {
    "maskgit-vqgan-imagenet-f16-256.bin": "configs/training/teacher/maskgit-vqgan_f16_256.yaml",
    **{f"tokenizer_titok_{size}.bin": f"configs/eval/titok_{size}.yaml" for size in ("l32", "b64", "s128")},
    **{
        f"generator_titok_{size}.bin": f"configs/training/generator/maskgit_titok_{size}.yaml"
        for size in ("l32", "b64", "s128")
    },
}
