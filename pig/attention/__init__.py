"""The only folder that touches attention. Start with `reference`, BootPIG's Reference Self-Attention.

`products`: queries, keys, values. `reference`: RSA as it is trained. `merged`: the same in sampling, by log sums.
`reading`: the Reference UNet's side. `install`: which processor serves which layer.

Notation: f = input of a self-attention layer `attn1` (after its LayerNorm), (B, N, C); f_ref = the same layer's input
in the Reference UNet; K = references per sample; H = heads. All state travels in one argument, `context`, through
`cross_attention_kwargs`: a plain object (accelerate's hooks copy mappings and tuples, and values written to a copy are
lost). The processors themselves hold settings only. No code outside of this folder computes with the layers' weights.
"""
