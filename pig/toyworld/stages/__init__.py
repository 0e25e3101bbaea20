"""How each of the toy world's small models is trained: one LightningModule a file, its settings at the top."""
