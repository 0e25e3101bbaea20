"""What the command line does beside training: `generate`, `export`, `app`."""
