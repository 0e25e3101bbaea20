"""How the second edition's models are trained: one LightningModule each."""
