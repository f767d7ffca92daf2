"""CPU kernels for training and sampling from Llama-type models."""
