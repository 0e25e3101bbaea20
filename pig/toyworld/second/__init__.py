"""The toy world's second edition, whose models are being trained; it replaces the first when they are ready.

It lives beside the first so that the shipped weights, the tests and the demo stay in step.
"""
