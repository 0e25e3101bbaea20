"""Sampling, shared by all methods: `pipeline` (the face of every method), `loop`, `settings`, `guidance`, `references`,
`inpainting`."""
