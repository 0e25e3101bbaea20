"""pig: personalised image generation on PyTorch Lightning, diffusers and webdataset."""

import logging

# diffusers imports bitsandbytes wherever it is, which on CPUs tells every time of a package that it would like to have.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
