"""Training, shared by all methods: `module` (what every LightningModule is), `step`, `optimizers`, `checkpoints`,
`callbacks`, `memory`."""
