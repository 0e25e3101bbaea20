"""pig: personalised image generation on PyTorch Lightning, diffusers and webdataset."""
