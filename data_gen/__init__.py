"""Make training data: triplet shards in the contract of `pig.data.schema`."""
