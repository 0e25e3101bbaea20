"""The embedded default: a drawn world (`scene`) and small models trained on it (`pretrain`, `weights/`)."""
