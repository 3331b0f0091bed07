"""Networks and pure functions. Importing the package registers every model with modeling.checkpoints.registry."""

import modeling.maskgit
import modeling.one_d_piece
import modeling.pixel_vqgan
import modeling.titok  # noqa: F401
