import pig  # noqa: F401  # before diffusers: see there
